"""The table of steps behind compressed prompts (compressed*.csv). Called by __main__.py."""

from .documents import table
from .records import CompressedRecord
from .steps import GB, PLANS, tokens


def table_of(rows: list[CompressedRecord]) -> str:
    lines = []
    for row in rows:
        names = [row.model, PLANS.get(row.plan, row.plan), row.method]
        numbers = [
            tokens(row.context),
            str(row.batch),
            f"{row.kept:,}",
            f"{row.prompt_s:.2f}",
            f"{100 * row.choice_s / row.prompt_s:.2f}%",
        ]
        numbers += [f"{row.step_ms:.2f}", f"{row.step_ms / row.kept_ms:.3f}", str(row.new_captures)]
        numbers += [f"{each / GB:.3f}" for each in (row.kv_bytes, row.driver_bytes, row.budget_bytes)]
        lines.append([*names, *numbers])
    header = ["model", "plan", "kept by", "prompt", "rows", "kept", "prompt, s", "choice, of prompt"]
    header += ["step, ms", "over a context of that length", "captured anew"]
    return table([*header, "KV, GB", "by the driver, GB", "allowed, GB"], lines, 3)
