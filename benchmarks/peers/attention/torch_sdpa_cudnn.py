"""torch SDPA, cuDNN backend."""

DEVICES = ("cuda",)


def prepare(problem):
    from torch.nn.attention import SDPBackend

    from ._sdpa import prepare_backend

    return prepare_backend(problem, SDPBackend.CUDNN_ATTENTION)
