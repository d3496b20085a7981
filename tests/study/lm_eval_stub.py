"""The parts of lm-eval that zigzag_ext calls, as small as they can be: the package itself takes half a gigabyte.

A task asks to repeat a number; the model class generates as lm-eval's does. `test_ruler.py` runs the same calls on the real one.
"""

import random
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np

REGISTRY: dict[str, type] = {}


def greedy(model, tokenizer, text, tokens=8):
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    found = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(found[0, inputs["input_ids"].shape[1] :])


class HFLM:
    def __init__(self, pretrained, backend="default", tokenizer=None, batch_size=1, max_length=None):
        self.model, self.tokenizer, self.backend, self.batch_size = pretrained, tokenizer, backend, batch_size

    def generate_until(self, requests, disable_tqdm=False):
        answers = []
        for request in requests:
            text, options = request.args
            answers.append(greedy(self.model, self.tokenizer, text, options["max_gen_toks"]))
        return answers


class Task:
    """Prompts drawn from the global generators, as RULER's are; the score is the share of digits among the answer's letters."""

    def __init__(self, length: int):
        rng = lambda: random.randrange(10**6) + int(np.random.randint(10**6))  # noqa: E731
        self.docs = [{"input": f"{rng():07d}" + "x" * (length - 20), "max_length": length} for _ in range(500)]
        self.instances = []

    def build_all_requests(self, limit, rank, world_size):
        print("stdout noise")
        print("stderr noise", file=sys.stderr)
        self.instances = [SimpleNamespace(doc=doc, args=(doc["input"], {"max_gen_toks": 8})) for doc in self.docs[:limit]]

    def process_results(self, doc, results):
        share = sum(letter.isdigit() for letter in results[0]) / len(results[0])
        return {"4096": -1.0, str(doc["max_length"]): share}


class TaskManager:
    def __init__(self, include_path, include_defaults, metadata):
        from nltk import download
        from transformers import AutoTokenizer

        assert include_path.endswith("ruler") and not include_defaults
        assert download("punkt_tab") is False, "the network was asked"
        AutoTokenizer.from_pretrained(metadata["tokenizer"])
        (self.length,) = metadata["max_seq_lengths"]

    def load_task_or_group(self, names):
        return {name: Task(self.length) for name in names}


def register_model(*names):
    def keep(kind):
        REGISTRY.update(dict.fromkeys(names, kind))
        return kind

    return keep


def download(*_):
    raise AssertionError("the network was asked")


def modules(command_line) -> dict[str, ModuleType]:
    """For sys.modules. `command_line` is what `lm_eval` runs from a shell."""
    contents = {
        "lm_eval": {},
        "lm_eval.__main__": {"cli_evaluate": command_line},
        "lm_eval.api": {},
        "lm_eval.api.registry": {"register_model": register_model},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
        "lm_eval.tasks": {"TaskManager": TaskManager, "__file__": "/lm_eval/tasks/__init__.py"},
        "nltk": {"download": download},
    }
    made = {}
    for name, content in contents.items():
        made[name] = ModuleType(name)
        made[name].__spec__, made[name].__path__ = ModuleSpec(name, None), []
        vars(made[name]).update(content)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, made[name])
    return made
