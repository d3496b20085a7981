"""Offline, seeded evaluation of a model under a plan: tasks, one per file, and the CSV rows they give.

rows = zz.evaluate.passkey(model, tokenizer, plan, lengths=[1024, 4096], prompts=20)
zz.evaluate.append("rows.csv", rows)
"""

from .acceptance import accepted
from .multikey import multikey
from .multivalue import multivalue
from .passkey import passkey
from .perplexity import perplexity
from .quotation import quotation
from .results import Row, append, read
from .ruler import RULER, RulerTask
from .scoring import score, score_each
from .second_question import second_question
from .task import Task

TASKS: dict[str, Task] = {task.name: task for task in (passkey, multikey, multivalue, second_question, quotation, perplexity)}

__all__ = [
    "RULER", "TASKS", "Row", "RulerTask", "Task", "accepted", "append", "multikey", "multivalue", "passkey", "perplexity",
    "quotation", "read", "score", "score_each", "second_question",
]  # fmt: skip
