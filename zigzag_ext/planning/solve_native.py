"""`solve(native=...)`: the layers of a model, and of these the full-attention ones, which are solved."""

from collections.abc import Sequence

from .costs import kv_costs, per_layer
from .plan import token_count
from .plan_text import ranges


class Layers:
    """The layers of a model, `windows` of native ones, 0 without keys and None for those that scores have a row for, in order.

    Raises ValueError if there are not `rows` of them, or a window is out of range.
    """

    def __init__(self, windows: Sequence[int | None], rows: int):
        given = [None] * rows if not len(windows) else list(windows)
        self.windows = tuple(None if w is None else token_count(f"native: layer {i}", w) for i, w in enumerate(given))
        if wrong := [(layer, window) for layer, window in enumerate(self.windows) if window is not None and window < 0]:
            raise ValueError("native: the window of layer {} must be a number of tokens or 0: no keys; got {}".format(*wrong[0]))
        self.full = tuple(layer for layer, window in enumerate(self.windows) if window is None)
        if len(self.full) != rows:
            raise ValueError(
                f"scores have {rows} rows, native names {len(self.full)} full-attention layers, one per row: {ranges(self.full)}"
            )

    def __len__(self) -> int:
        return len(self.windows)

    def rows(self, constraints: dict) -> dict:
        """Constraints in terms of rows of scores, from those in terms of the model's layers."""
        if len(self.full) == len(self):
            return constraints
        forced = {name: self._rows_of(name, constraints[name]) for name in ("force_retrieval", "force_streaming")}
        return constraints | forced | {"stages": self._rows_per_stage(constraints["stages"])}

    def _rows_of(self, name: str, layers: list[int]) -> list[int]:
        if wrong := [layer for layer in layers if layer not in self.full]:
            raise ValueError(f"{name}: layer {wrong[0]} is none of the model's full-attention layers, {ranges(self.full)}")
        return [self.full.index(layer) for layer in layers]

    def _rows_per_stage(self, stages: list[int]) -> list[int]:
        if stages and sum(stages) != len(self):
            raise ValueError(f"stages hold {sum(stages)} layers, the model has {len(self)}")
        ends = [sum(stages[: i + 1]) for i in range(len(stages))]
        return [sum(end - length <= layer < end for layer in self.full) for end, length in zip(ends, stages, strict=True)]

    def kv_costs(self, kv_heads: int | list[int], head_dim: int | list[int], element_bytes: int, context: int, **shape) -> tuple:
        """KV bytes per full-attention layer, as in `costs.kv_costs`; what native layers take is counted with the first one."""
        heads, dims = per_layer("kv_heads", kv_heads, len(self)), per_layer("head_dim", head_dim, len(self))
        own = [[sizes[layer] for layer in self.full] for sizes in (heads, dims)]
        kinds = kv_costs(len(self.full), *own, element_bytes, context, **shape)
        rings = [
            kv_costs(1, heads[layer], dims[layer], element_bytes, context, **shape | {"sink": 0, "window": window})[1][0]
            for layer, window in enumerate(self.windows)
            if window
        ]
        for kind in kinds:
            if kind:
                kind[0] += sum(rings)
        return kinds
