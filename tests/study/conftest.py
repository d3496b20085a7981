"""Fixtures of every study's tests: the tiny random model, on one thread."""

import importlib.util

from character_model import KV_HEADS, LAYERS, model, model_folder, one_thread, tokenizer  # noqa: F401

collect_ignore = [] if importlib.util.find_spec("lm_eval") else ["test_ruler.py"]  # needs the real package
