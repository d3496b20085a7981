"""The layers of a ZigzagCache, from a plan and a model's config."""

from collections.abc import Callable

from ..attention.store import LayerStore
from ..planning.kv_format import PLAIN
from ..planning.layers import EMPTY, HYBRID, STATES, layer_kinds
from ..planning.plan import Plan
from .layer import ZigzagLayer
from .state import CacheState
from .states import HybridLayer, StateLayer, check_served


def layers_of(state: CacheState, config, plan: Plan, rollback: int) -> list[ZigzagLayer | StateLayer]:
    """One layer for each of the model's. Raises ValueError if none attends, or this transformers has no states for them."""
    if len(plan.state_layers) == plan.num_layers:
        raise ValueError(f"{config.model_type}: none of its layers has attention; there is nothing that a ZigzagCache could hold")
    names = layer_kinds(config) or [None] * plan.num_layers
    numbers, stores_of = getattr(config, "number_of_conv_states", None) or 1, _stores_of(state, plan, rollback)

    def layer(index: int) -> ZigzagLayer | StateLayer:
        kind, name, states = plan.kinds[index], names[index], None
        if name in (*STATES, *EMPTY, *HYBRID):
            check_served(config)
            states = StateLayer(state, index, numbers, name not in EMPTY)
        if kind == "state":
            return states
        attends = state, index, stores_of(index), plan.native_windows[index] or 0
        return ZigzagLayer(*attends) if states is None else HybridLayer(states, *attends)

    return [layer(index) for index in range(plan.num_layers)]


def _stores_of(state: CacheState, plan: Plan, rollback: int) -> Callable[[int], list[LayerStore]]:
    """stores(layer): one, or two where the plan mixes heads of both kinds."""
    formats = (plan.kv_format, plan.ring_kv_format) if state.stores else (PLAIN, PLAIN)
    smooth = plan.key_smoothing

    def store(kind: str, layer: int, heads: tuple[int, ...] | None = None) -> LayerStore:
        if kind == "retrieval":
            return LayerStore(0, 0, 0, formats[0], smooth, heads, layer + 1 if state.compression else 0)
        return LayerStore(*plan.size(layer), rollback, formats[1], smooth, heads)

    def stores(layer: int) -> list[LayerStore]:
        kind = plan.kinds[layer]
        if isinstance(kind, str):
            return [store(kind, layer)]
        numbers = {name: tuple(head for head, own in enumerate(kind) if own == name) for name in ("retrieval", "streaming")}
        return [store(name, layer, heads) for name, heads in numbers.items()]

    return stores
