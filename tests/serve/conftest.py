"""Fixtures of the engine's tests."""

import pytest
from character_model import one_thread  # noqa: F401
from driving import Choices, Driver, margin

from zigzag_ext.serve import steps


@pytest.fixture
def watched(monkeypatch):
    """`watched(driver, ids, sampling)`: the `Choices` of a request that runs alone."""

    def watch(driver: Driver, ids, sampling) -> Choices:
        choices, plain = Choices(), steps.choose

        def choose(logits, draws):
            tokens = plain(logits, draws)
            choices.margins.append(margin(logits[0], draws[0], tokens[0]))
            return tokens

        monkeypatch.setattr(steps, "choose", choose)
        request = driver.submit(ids, sampling)
        driver.drain()
        monkeypatch.setattr(steps, "choose", plain)
        choices.tokens = request.result(0).token_ids
        return choices

    return watch
