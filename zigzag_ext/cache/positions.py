"""What position_ids without a mask must not say: that tokens belong to several documents, or stand among those held."""

from torch import Tensor


def check_positions(positions: Tensor, q_len: int, held: Tensor | None, short: bool, used: str) -> None:
    """Raises ValueError for positions that stand among the tokens held or start again.

    Args:
        positions: [batch or 1, q_len]; or of M-RoPE [n, batch or 1, q_len], of which the first of four rows counts tokens and the
            others neither rise within an image nor begin behind as many tokens as are held: these say nothing of documents.
        held: [batch] tokens held per row, None if there are none. short: on a cache that holds tokens, a step of a few columns,
            which waits for no GPU: they are looked at on a CPU only. used: the end of a message, see `Forward`.
    """
    if positions.shape[-1] != q_len:
        raise ValueError(f"position_ids must be [batch, {q_len}], one per new token; got {tuple(positions.shape)}{used}")
    if positions.dim() == 3:
        if positions.shape[0] != 4:
            return
        positions = positions[0]
    if short and positions.device.type != "cpu":
        return
    if held is not None and (positions[..., 0] < held).any():
        raise ValueError(f"position_ids start at {positions[..., 0].min().item()}, among the tokens that are held{used}")
    if (positions[..., 1:] <= positions[..., :-1]).any():
        raise ValueError(
            "position_ids go back within a row, as those of several documents packed into one do; tokens would attend to the "
            "documents before their own: give each document a row, and an attention_mask with 0 for padding"
        )
