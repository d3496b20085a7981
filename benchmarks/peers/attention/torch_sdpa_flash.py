"""torch SDPA, FlashAttention-2 backend: split-KV for one query."""

DEVICES = ("cuda",)


def prepare(problem):
    from torch.nn.attention import SDPBackend

    from ._sdpa import prepare_backend

    return prepare_backend(problem, SDPBackend.FLASH_ATTENTION)
