"""Methods that choose layers or heads, side by side: at equal KV bytes and at equal milliseconds, on the tasks of `evaluate`.

A comparison lives in a folder, and the same call goes on where an interrupted one stopped:

    scores/<method>.tsv   what each method gave; partial states of `identify` beside it
    costs.json            the cost table by which milliseconds are reckoned, if it was measured here
    run.json              what scores and cost table were made for
    rows.csv              the rows of `evaluate`, one per plan, task and length; never measured twice
    compare.csv           a line per method, level, budget, ratio, task and length (`table.Line`)
    overlap.csv           a line per two methods, level, budget and ratio (`table.Overlap`)

No evaluator, solver or state of its own: scores are `identify`'s, plans `solve`'s, rows those of the tasks.
"""

from .plans import BUDGETS, LEVELS, Choice, choices, jaccard
from .run import compare
from .settings import EVEN, Settings, Source, sources_of
from .table import Line, Overlap

__all__ = [
    "BUDGETS", "EVEN", "LEVELS", "Choice", "Line", "Overlap", "Settings", "Source", "choices", "compare", "jaccard", "sources_of",
]  # fmt: skip
