"""Prompts and completions as text: a tokenizer of single characters, whose model says anything."""

import pytest
from character_model import model, tokenizer  # noqa: F401
from driving import driven

import zigzag_ext as zz

PLAN = zz.Plan(["retrieval", "streaming", "streaming"], sink=4, window=16)
PROMPT = "What is to be said here?"


@pytest.fixture(scope="module")
def driver(model, tokenizer):  # noqa: F811
    with driven(model, PLAN, tokenizer=tokenizer) as driver:
        yield driver


def completed(driver, **options):
    tokens = []
    request = driver.submit(PROMPT, zz.Sampling(**{"max_tokens": 40} | options), tokens.append)
    driver.drain()
    return request.result(0), tokens


@pytest.fixture(scope="module")
def whole(driver):
    return completed(driver)[0]


@pytest.fixture(scope="module")
def texts(tokenizer, whole):  # noqa: F811
    """Of the first n tokens, n = 0 to 40; each adds a space and a character."""
    return [tokenizer.decode(whole.token_ids[:n]) for n in range(41)]


def test_text_is_that_of_the_tokens(whole, texts):
    assert (whole.text, whole.finish_reason, whole.prompt_tokens) == (texts[40], "length", len(PROMPT))
    assert len(whole.text) >= 40


def test_a_stop_string_ends_a_request_with_the_token_that_completes_it(driver, whole, texts):
    stop = texts[13][len(texts[10]) :]
    done, tokens = completed(driver, stop=[stop, "not there"])
    assert (done.text, done.finish_reason) == (texts[10], "stop")
    assert done.token_ids == whole.token_ids[:13] == [token.id for token in tokens]
    assert "".join(token.text for token in tokens) == done.text


def test_text_that_may_begin_a_stop_string_waits_and_comes(driver, texts):
    done, tokens = completed(driver, stop=texts[12][len(texts[10]) :] + "not there")
    assert done.text == texts[40] and tokens[10].text == tokens[11].text == ""
    assert tokens[12].text == texts[13][len(texts[10]) :]


def test_a_stop_string_of_the_last_token_wins_over_the_length(driver, texts):
    done, _ = completed(driver, max_tokens=13, stop=texts[13][-1])
    assert done.finish_reason == "stop"


def test_a_tokenizer_that_fails_ends_its_request_only(driver, whole, monkeypatch):
    other = driver.submit(PROMPT, zz.Sampling(40))
    failing = driver.submit(PROMPT, zz.Sampling(40))
    driver.until(lambda: len(failing.tokens) == 5)

    def fail(ids):
        raise LookupError("no such token")

    monkeypatch.setattr(failing._stream, "_decode", fail)
    driver.drain()
    with pytest.raises(LookupError, match="no such token"):
        failing.result(0)
    assert failing.state == "failed" and other.result(0).text == whole.text


def test_a_cancelled_request_has_the_text_so_far(driver, texts):
    request = driver.submit(PROMPT, zz.Sampling(40))
    driver.until(lambda: len(request.tokens) == 7)
    request.cancel()
    driver.step()
    assert request.result(0).text == texts[7]
