"""The endpoints, in this process: tokens are the engine's, through OpenAI's client too, and whatever is wrong is said by name."""

import json

import openai
import pytest
from character_model import model, tokenizer  # noqa: F401
from prometheus_client.parser import text_string_to_metric_families
from serving import TEMPLATE
from starlette.testclient import TestClient

import zigzag_ext as zz
from zigzag_ext.serve.http import Service, create_app
from zigzag_ext.serve.http.answers import Answer

PLAN = zz.Plan(["retrieval", "streaming", "streaming"], sink=4, window=16)
NAME, PROMPT = "tiny/model", "What is to be said here?"
MESSAGES = [{"role": "developer", "content": "Speak."}, {"role": "user", "content": [{"type": "text", "text": "What?"}]}]
SAID = "system: Speak.\nuser: What?\nassistant: "
GREEDY = {"model": NAME, "temperature": 0}


@pytest.fixture(scope="module")
def engine(model, tokenizer):  # noqa: F811
    tokenizer.chat_template = TEMPLATE
    with zz.Engine(model, PLAN, max_len=400, max_rows=4, tokenizer=tokenizer) as engine:
        yield engine
    tokenizer.chat_template = None


@pytest.fixture(scope="module")
def service(engine):
    return Service(engine, NAME)


@pytest.fixture(scope="module")
def client(service):
    return TestClient(create_app(service), raise_server_exceptions=False)


@pytest.fixture
def stock(client):
    return openai.OpenAI(base_url="http://testserver/v1", api_key="any", http_client=client, max_retries=0)


def alone(engine, prompt: str, sampling: zz.Sampling) -> zz.Completion:
    return engine.generate([engine.tokenizer(prompt)["input_ids"]], [sampling])[0]


def refused(response) -> dict:
    """The error of an answer, which is in OpenAI's shape."""
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} == set(error) and "\n" not in error["message"]
    return error | {"status": response.status_code}


SAMPLINGS = [
    {"max_tokens": 30, "temperature": 0},
    {"max_tokens": 30, "temperature": 1.5, "seed": 7},
    {"max_tokens": 30, "temperature": 1, "top_p": 0.5, "top_k": 9, "seed": 3, "ignore_eos": True},
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
def test_a_completion_has_the_engines_tokens(engine, client, options, stream):
    wanted = alone(engine, PROMPT, zz.Sampling(**options))
    fields = {"model": NAME, "prompt": PROMPT, "stream": stream, **options}
    answer = client.post("/v1/completions", json=fields | ({"stream_options": {"include_usage": True}} if stream else {}))
    assert answer.status_code == 200
    if stream:
        *events, done = answer.text.strip().split("\n\n")
        *pieces, last, totals = (json.loads(line.removeprefix("data: ")) for line in events)
        assert done == "data: [DONE]" and {each["id"] for each in [*pieces, last, totals]} == {last["id"]}
        assert {each["choices"][0]["finish_reason"] for each in pieces} == {None} and len(pieces) > 20
        text, reason = "".join(each["choices"][0]["text"] for each in pieces), last["choices"][0]["finish_reason"]
        usage = totals["usage"]
        assert totals["choices"] == [] and last["usage"] is None
    else:
        [choice], usage = answer.json()["choices"], answer.json()["usage"]
        text, reason = choice["text"], choice["finish_reason"]
    assert (text, reason) == (wanted.text, wanted.finish_reason) == (wanted.text, "length")
    assert 0 <= usage.pop("prompt_tokens_details")["cached_tokens"] < len(PROMPT)
    assert usage == {"prompt_tokens": len(PROMPT), "completion_tokens": 30, "total_tokens": len(PROMPT) + 30}


def test_beginnings_are_shared_within_a_salt(client):
    def cached(text, **salt):
        fields = GREEDY | {"prompt": text, "max_tokens": 2} | salt
        return client.post("/v1/completions", json=fields).json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    text = "A beginning that two prompts have, and nobody else in this file, long enough to be worth it. "
    assert cached(text) == 0 and cached(text + "More.") == len(text)
    assert cached(text + "More.", cache_salt="of others") == 0


@pytest.mark.parametrize("is_chat", [False, True])
def test_usage_tells_what_was_cached(is_chat):
    completion, answer = zz.Completion([1, 2], "ab", "stop", 9, 7, 0), Answer(NAME, is_chat, usage_wanted=True)
    totals = json.loads(answer.closing(completion)[-2].decode().removeprefix("data: "))
    for usage in (totals["usage"], answer.whole(completion)["usage"]):
        details = usage.pop("prompt_tokens_details")
        assert usage == {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11} and details == {"cached_tokens": 7}


def test_prompts_may_be_token_ids_and_alone_in_a_list(engine, client):
    ids = engine.tokenizer(PROMPT)["input_ids"]
    texts = [client.post("/v1/completions", json=GREEDY | {"prompt": p}).json() for p in (PROMPT, [PROMPT], ids, [ids])]
    wanted = alone(engine, PROMPT, zz.Sampling(16)).text  # 16 new tokens where nothing is said
    assert [each["choices"][0]["text"] for each in texts] == [wanted] * 4


def test_a_stop_string_ends_an_answer(engine, client):
    text = alone(engine, PROMPT, zz.Sampling(30)).text
    wanted = text[: text.find(text[20:24])]
    for stop in (text[20:24], [text[20:24], "not there"]):
        answer = client.post("/v1/completions", json=GREEDY | {"prompt": PROMPT, "max_tokens": 30, "stop": stop}).json()
        assert answer["choices"][0] == {"index": 0, "text": wanted, "logprobs": None, "finish_reason": "stop"}


def test_the_stock_client_completes_chats_and_streams(engine, stock):
    wanted = alone(engine, SAID, zz.Sampling(40))
    chat = stock.chat.completions.create(model=NAME, messages=MESSAGES, max_completion_tokens=40, temperature=0)
    assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == (wanted.text, "length")
    assert chat.choices[0].message.role == "assistant" and chat.usage.prompt_tokens_details.cached_tokens < len(SAID)
    again = [*MESSAGES, chat.choices[0].message.model_dump(), {"role": "user", "content": "And?"}]  # as it came, nulls and all
    said = f"{SAID}{wanted.text}\nuser: And?\nassistant: "
    second = stock.chat.completions.create(model=NAME, messages=again, max_tokens=9, temperature=0, n=1, user="x", store=False)
    assert second.choices[0].message.content == alone(engine, said, zz.Sampling(9)).text
    usage = {"include_usage": True}
    *pieces, totals = stock.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=40, temperature=0, stream=True, stream_options=usage
    )
    assert pieces[0].choices[0].delta.role == "assistant" and pieces[-1].choices[0].finish_reason == "length"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == wanted.text
    assert (totals.usage.prompt_tokens, totals.usage.completion_tokens) == (len(SAID), 40)
    assert stock.completions.create(model=NAME, prompt=PROMPT, max_tokens=5, temperature=0).usage.completion_tokens == 5
    [listed] = stock.models.list()
    assert listed == stock.models.retrieve(NAME) and (listed.id, listed.max_model_len) == (NAME, 400)


def test_a_chat_without_a_number_gets_what_fits(client):
    answer = client.post("/v1/chat/completions", json=GREEDY | {"messages": MESSAGES}).json()
    assert answer["usage"]["total_tokens"] == 400 and answer["choices"][0]["finish_reason"] == "length"


def test_the_stock_client_raises_what_is_meant(stock, monkeypatch, engine):
    with pytest.raises(openai.NotFoundError, match="no model 'other', this is 'tiny/model'"):
        stock.completions.create(model="other", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="give at most 400 in all") as caught:
        stock.completions.create(model=NAME, prompt=PROMPT, max_tokens=400)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="users speak first"):
        stock.chat.completions.create(model=NAME, messages=[{"role": "assistant", "content": "I"}])
    monkeypatch.setattr(engine._scheduler, "limit", 0)
    with pytest.raises(openai.RateLimitError, match="queue=0") as caught:
        stock.completions.create(model=NAME, prompt=PROMPT)
    assert caught.value.response.headers["retry-after"] == "1" and caught.value.code == "queue_full"


def test_exactly_what_fits_is_served_and_one_token_more_is_not(client, engine):
    before = engine.stats()["prompt_tokens"]
    fields = GREEDY | {"prompt": "x" * 300}
    assert refused(client.post("/v1/completions", json=fields | {"max_tokens": 101}))["code"] == "context_length_exceeded"
    assert refused(client.post("/v1/completions", json=fields | {"max_tokens": 1 << 70}))["status"] == 400
    assert engine.stats()["prompt_tokens"] == before
    assert client.post("/v1/completions", json=fields | {"max_tokens": 100}).json()["usage"]["completion_tokens"] == 100


BAD = {  # of /v1/completions; null takes a field away
    "prompt: Field required": {"prompt": None},
    "model: Field required": {"model": None},
    "prompt must be one text or the token ids of one, got ['a', 'b']": {"prompt": ["a", "b"]},
    "prompt must be one text or the token ids of one, got [1, -1]": {"prompt": [1, -1]},
    "prompt must be one text or the token ids of one, got [True]": {"prompt": [True]},
    "a prompt must be of tokens 0 to 99, got 100": {"prompt": [100]},
    "a prompt must be a list of at least one token": {"prompt": ""},
    "half of a surrogate pair at 1": {"prompt": "a\ud800"},
    "max_tokens: Input should be a valid integer": {"max_tokens": "4"},
    "max_tokens must be at least 1, got 0": {"max_tokens": 0},
    "temperature must be at least 0 and finite, got -1.0": {"temperature": -1},
    "temperature must be at least 0 and finite, got nan": {"temperature": float("nan")},
    "top_p must be above 0 and at most 1, got 0.0": {"top_p": 0},
    "top_k must be at least 1 token or None, got -1": {"top_k": -1},
    "seed must be 0 to 2^64 - 1 or None, got -1": {"seed": -1},
    "stop must be strings of 1 to 256 characters, got ''": {"stop": ""},
    "stop must be strings of 1 to 256 characters, got [1]": {"stop": [1]},
    "stop must be at most 16 strings, got 17": {"stop": ["a"] * 17},
    "cache_salt: Input should be a valid string": {"cache_salt": 1},
    "stream_options is for stream=true": {"stream_options": {}},
    "stream_options.all: Extra inputs are not permitted": {"stream": True, "stream_options": {"all": 1}},
    "there is no field 'max_token'": {"max_token": 4},
    "n=2 is not served, leave it out": {"n": 2},
    "n=True is not served, leave it out": {"n": True},
    "logprobs=0 is not served, leave it out": {"logprobs": 0},
    "echo=True is not served, leave it out": {"echo": True},
    "presence_penalty=0.5 is not served, leave it out": {"presence_penalty": 0.5},
    "logit_bias={'5': 100} is not served, leave it out": {"logit_bias": {"5": 100}},
    "response_format={'type': 'json_object'} is not served": {"response_format": {"type": "json_object"}},
    "there is no field 'max_completion_tokens'": {"max_completion_tokens": 4},
}


@pytest.mark.parametrize("words", BAD)
def test_bad_fields_of_completions_are_named(client, engine, words):
    before = engine.stats()["prompt_tokens"]
    fields = {name: value for name, value in ({"model": NAME, "prompt": PROMPT} | BAD[words]).items() if value is not None}
    error = refused(client.post("/v1/completions", content=json.dumps(fields), headers={"Content-Type": "application/json"}))
    assert error["status"] == 400 and words in error["message"] and error["type"] == "invalid_request_error"
    assert error["param"] in BAD[words] and engine.stats()["prompt_tokens"] == before


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": "text"}, "messages: Input should be a valid list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: Input should be 'system'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        ({"messages": [{"role": "user", "content": None}]}, "must be text, got None"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "must be text, got [{'type': 'image_url'}]"),
        ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "'name' of messages is not served"),
        ({"tools": [{"type": "function"}]}, "tools=[{'type': 'function'}] is not served"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens and max_completion_tokens differ"),
        ({"prompt": "x"}, "there is no field 'prompt'"),
    ],
)
def test_bad_fields_of_chats_are_named(client, fields, words):
    error = refused(client.post("/v1/chat/completions", json={"model": NAME, "messages": MESSAGES} | fields))
    assert error["status"] == 400 and words in error["message"]


@pytest.mark.parametrize(
    "path, content, content_type, status, words",
    [
        ("/v1/completions", b"{", "application/json", 400, "the body is not JSON"),
        ("/v1/completions", b"{}", "application/x-www-form-urlencoded", 400, "the header Content-Type: application/json"),
        ("/v1/completions", b"[1]", "application/json", 400, "must be a JSON object"),
        ("/v1/completions", b"", "application/json", 400, "must be a JSON object"),
        ("/v1/completions", b"[" * 100_000, "application/json", 400, "error parsing the body"),
        ("/v1/completions", b'{"model": "\xff"}', "application/json", 400, "error parsing the body"),
        ("/v1/completions", b" " * 1_100_000, "application/json", 413, "the body has more than 1,061,376 bytes"),
        ("/v1/completions", iter([b" " * 600_000] * 2), "application/json", 413, "the body has more than 1,061,376 bytes"),
        ("/v1/embeddings", b"{}", "application/json", 404, "POST /v1/embeddings: Not Found"),
        ("/v1/models", b"{}", "application/json", 405, "POST /v1/models: Method Not Allowed"),
    ],
)  # fmt: skip
def test_bad_bodies_and_paths_are_named(client, path, content, content_type, status, words):
    error = refused(client.post(path, content=content, headers={"Content-Type": content_type}))
    assert error["status"] == status and words in error["message"]


def test_a_key_is_asked_for_before_anything_is_read(engine):
    client = TestClient(create_app(Service(engine, NAME, api_key="schlüssel 1")))
    fields = GREEDY | {"prompt": PROMPT, "max_tokens": 2}
    for key, words in [
        (None, "no key"),
        ("Bearer x", "not the one"),
        ("Bearer schlüssel 2", "not the one"),
        ("Basic x", "no key"),
    ]:
        headers = {} if key is None else {"Authorization": key.encode()}
        error = refused(answer := client.post("/v1/completions", content=b"{", headers=headers))
        assert (error["status"], error["code"]) == (401, "invalid_api_key") and words in error["message"]
        assert answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/v1/models").status_code == 401 and client.get("/health").status_code == 200
    headers = {"Authorization": "Bearer schlüssel 1".encode()}
    assert client.post("/v1/completions", json=fields, headers=headers).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails_is_an_error_and_the_next_one_is_served(client, engine, monkeypatch, stream):
    def fail(*args):
        raise LookupError("no such token")

    fields = GREEDY | {"prompt": PROMPT, "max_tokens": 4, "stream": stream}
    with monkeypatch.context() as patch:
        patch.setattr("zigzag_ext.serve.text.TextStream.push", fail)
        answer = client.post("/v1/completions", json=fields)
    error = json.loads(answer.text.removeprefix("data: "))["error"]
    assert (answer.status_code, error["code"]) == (200 if stream else 500, "request_failed")
    assert error["message"] == "the request failed: LookupError: no such token"
    assert client.post("/v1/completions", json=fields).status_code == 200


def test_what_nobody_foresaw_is_an_error_in_the_same_shape(client, service, monkeypatch, caplog):
    monkeypatch.setattr(type(service), "check_model", lambda *args: 1 / 0)
    error = refused(client.post("/v1/completions", json=GREEDY | {"prompt": PROMPT}))
    assert (error["status"], error["message"]) == (500, "the server failed: ZeroDivisionError")
    assert "/v1/completions failed" in caplog.text


def test_a_model_without_a_chat_template_completes_only(client, engine, monkeypatch):
    monkeypatch.setattr(engine.tokenizer, "chat_template", None)
    error = refused(client.post("/v1/chat/completions", json=GREEDY | {"messages": MESSAGES}))
    assert "no chat template: use /v1/completions" in error["message"]


def sample(client, name: str, **labels) -> float:
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = {(each.name, *sorted(each.labels.items())): each.value for family in families for each in family.samples}
    return samples[(name, *sorted(labels.items()))]


def test_metrics_count_what_has_been_done(engine):
    client = TestClient(create_app(Service(engine, NAME)))
    names = [
        ("zigzag_requests_total", {"state": "finished"}), ("zigzag_tokens_total", {"kind": "generated"}),
        ("zigzag_ttft_seconds_count", {}), ("zigzag_itl_seconds_count", {}), ("zigzag_tokens_total", {"kind": "prompt"}),
        ("zigzag_prefix_hit_tokens_total", {}),
    ]  # fmt: skip
    before = [sample(client, name, **labels) for name, labels in names]
    for stream in (False, True):
        client.post("/v1/completions", json=GREEDY | {"prompt": PROMPT, "max_tokens": 5, "stream": stream})
    after = [sample(client, name, **labels) for name, labels in names]
    *counts, read, cached = (b - a for a, b in zip(before, after, strict=True))
    assert counts == [2, 10, 2, 8] and read + cached == 2 * len(PROMPT)
    assert sample(client, "zigzag_responses_total", code="200") == 2
    assert sample(client, "zigzag_requests_running") == sample(client, "zigzag_kv_reserved_bytes") == 0
    client.post("/v1/completions", json={})
    assert sample(client, "zigzag_responses_total", code="400") == 1
    openmetrics = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert "openmetrics" in openmetrics.headers["content-type"] and openmetrics.text.endswith("# EOF\n")


def test_a_served_engine_needs_a_tokenizer(engine, monkeypatch):
    monkeypatch.setattr(engine, "tokenizer", None)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        Service(engine, NAME)
