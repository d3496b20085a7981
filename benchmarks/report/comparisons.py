"""What rows of prompts come to, in lines of text."""

from ..cells.prefill_cells import FULL
from .records import PrefillRecord, StepRecord


def of_chunks(rows: list[PrefillRecord]) -> list[str]:
    """What the numbers come to, one line per comparison for which there are rows."""
    time_of = {(row.scenario, row.impl): row.p50_us for row in rows}
    rate_of = {(row.scenario, row.impl): row.tflops for row in rows}
    lines = []

    def compare(scenario, best_of, text, form, ours="zigzag"):
        theirs = [time_of[scenario, impl] for impl in best_of if (scenario, impl) in time_of]
        if theirs and (scenario, ours) in time_of:
            lines.append(f"{scenario}: {text} {form(time_of[scenario, ours], min(theirs))}")

    for scenario in dict.fromkeys(row.scenario for row in rows):
        full = [impl for name, impl in time_of if name == scenario and impl.startswith(FULL)]
        compare(scenario, full, "streaming layer in percent of the best full layer:", lambda a, b: f"{100 * a / b:.2f}")
        compare(scenario, ["flex_attention"], "times as fast as FlexAttention:", lambda a, b: f"{b / a:.2f}")
        if scenario.startswith("retrieval"):
            compare(scenario, ["cudnn", "flash", "torch_cpu"], "time over torch's best:", lambda a, b: f"{a / b:.3f}")
            compare(scenario, ["fa3"], "with fa3, time over fa3:", lambda a, b: f"{a / b:.3f}", ours="route_fa3")
        if scenario.startswith(("short", "prefill")):
            others = [impl for name, impl in time_of if name == scenario and impl not in ("zigzag", "cudnn_dense")]
            compare(scenario, others, "time over the best route:", lambda a, b: f"{a / b:.3f}")
        if (scenario, "cudnn_dense") in rate_of and (scenario, "zigzag") in rate_of:
            share = 100 * rate_of[scenario, "zigzag"] / rate_of[scenario, "cudnn_dense"]
            lines.append(f"{scenario}: percent of cuDNN's dense TFLOP/s: {share:.1f}")
    if ("streaming_64k", "zigzag") in time_of and ("streaming_256k", "zigzag") in time_of:
        growth = time_of["streaming_256k", "zigzag"] / time_of["streaming_64k", "zigzag"]
        lines.append(f"streaming_64k to streaming_256k: {growth:.2f} times the time")
    return lines


def of_prompts(rows: list[StepRecord]) -> list[str]:
    """What exclusive plans gain over full retrieval, and memory beside weights and KV, one line per prompt."""
    rows = [row for row in rows if row.phase == "prefill"]
    full = {(row.model, row.context): row for row in rows if row.impl == "zigzag_eager" and row.plan == "retrieval_100"}
    lines = []
    for row in rows:
        memory = f", {row.beside_bytes / 2**30:.2f} GiB above weights and KV" if row.peak_bytes else ""
        other = full.get((row.model, row.context))
        gain = f", {other.wall_ms / row.wall_ms:.2f} times as fast as retrieval_100" if other and other != row else ""
        lines.append(f"prefill {row.impl} {row.plan} {row.context}: {row.wall_ms / 1e3:.2f} s{gain}{memory}")
    return lines
