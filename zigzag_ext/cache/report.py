"""What a ZigzagCache takes, in words."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cache import ZigzagCache


def memory_report(self: "ZigzagCache") -> str:
    """A small table of text: layers, bytes of tokens (`kv_bytes`) and bytes of memory, by kind and format, with scales."""
    groups: dict[tuple[str, str], list] = {}
    for layer in self.attention_layers:
        for store in layer.stores:
            kind = "native" if layer.native_window else "streaming" if store.window else "retrieval"
            groups.setdefault((kind + (" heads" if store.heads else ""), str(store.kv_format)), []).append(store)
    held = self.state.slots_held
    sums = [
        (*key, len(group), sum(store.kv_bytes(held(store)) for store in group), sum(store.memory_bytes for store in group))
        for key, group in groups.items()
    ]
    state_bytes = sum(states.memory_bytes for states in self.states)
    sums += [("state", "", len(self.states), state_bytes, state_bytes)] if self.states else []
    sums.append(("all", "", len(self.layers), self.kv_bytes() + state_bytes, self.memory_bytes()))
    rows = [
        (kind, f"{n} layers", kv_format, f"{held:,} bytes in", f"{memory:,} bytes") for kind, kv_format, n, held, memory in sums
    ]
    if compressed := self.compressed.values():
        kept = sum(kept for kept, _ in compressed) / len(compressed)
        rows.append(("compressed", f"{len(compressed)} layers", "", f"{kept:,.0f} of {self.state.longest:,} tokens kept", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
