"""Prompts that begin as earlier ones, in an engine with small pages and near marks."""

from contextlib import contextmanager

import pytest
import torch
from driving import Choices, driven, ids_of
from tiny_models import new_model

import zigzag_ext as zz
from zigzag_ext.serve import prefixes, steps

SINK, WINDOW, PAGE, EVERY = 4, 20, 8, 32  # tokens; a page of 4 KiB holds 8 of them here
TEXT = ids_of(300, 11)
GIVEN, NEW = 70, 5  # tokens of the prompt that others begin with, and of its answer


def plan_of(kinds=("retrieval", "streaming"), **formats) -> zz.Plan:
    return zz.Plan(kinds, sink=SINK, window=WINDOW, **formats)


def model_of() -> torch.nn.Module:
    return new_model("llama", num_hidden_layers=2)


PLAN, RETRIEVAL, MIXED = plan_of(), plan_of(["retrieval"] * 2), plan_of([("streaming", "retrieval"), "streaming"])
SMOOTHED = plan_of(kv_format="int8", key_smoothing=True)


@pytest.fixture(autouse=True)
def marks_are_near(monkeypatch):
    for module in (prefixes, steps):
        monkeypatch.setattr(module, "MARK_EVERY", EVERY)


@contextmanager
def sharing(plan=PLAN, model=None, least=1, **options):
    """A driver that shares beginnings of `least` tokens or more."""
    with driven(model or model_of(), plan, prefix_cache=True, **{"prefill_chunk": 24} | options) as driver:
        driver.steps.prefixes.least = least
        yield driver


def run(driver, ids, new=NEW, **options):
    request = driver.submit(ids, zz.Sampling(new, ignore_eos=True), **options)
    driver.finish()
    return request.result(0)


def cold(driver, watched, ids, new=NEW) -> Choices:
    """What a prompt gives when nothing is kept."""
    driver.steps.prefixes.clear()
    choices = watched(driver, ids, zz.Sampling(new, ignore_eos=True))
    driver.steps.prefixes.clear()
    return choices


def reached(places, common: int, slots: int = SINK + WINDOW) -> int:
    """Tokens that are spared by a row with rings of `slots` slots as of `places`, of `common` tokens."""
    return max(place if place <= common else common if place - common == 1 or place <= slots else 0 for place in places)
