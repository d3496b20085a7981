"""A server that listens: clients that go, read slowly or come together, and every way in which it ends."""

import os
import signal
import threading
import time

import httpx2
import pytest
from character_model import model, tokenizer  # noqa: F401
from serving import Raw, live, text_of, until

import zigzag_ext as zz
from zigzag_ext.serve.http import Service, bind

PLAN = zz.Plan(["retrieval", "streaming", "streaming"], sink=4, window=16)
PROMPT = "What is to be said here?"
SHORT = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 12}
LONG = SHORT | {"max_tokens": 2900}


@pytest.fixture(scope="module")
def wanted(model, tokenizer):  # noqa: F811
    """The text of `SHORT`, and of 500 tokens."""
    with zz.Engine(model, PLAN, max_len=3000, max_rows=2, tokenizer=tokenizer) as engine:
        return [each.text for each in engine.generate([PROMPT] * 2, [zz.Sampling(12), zz.Sampling(500)])]


@pytest.fixture
def engine(model, tokenizer, wanted):  # noqa: F811
    with zz.Engine(model, PLAN, max_len=3000, max_rows=2, queue=2, tokenizer=tokenizer) as engine:
        yield engine
        assert engine.stats()["kv_bytes"] == engine.stats()["reserved_bytes"] == 0


@pytest.fixture
def service(engine):
    return Service(engine, "tiny")


@pytest.fixture
def server(service):
    with live(service) as server:
        yield server


def post(server, **fields) -> httpx2.Response:
    return httpx2.post(f"http://127.0.0.1:{server.port}/v1/completions", json=SHORT | fields, timeout=20)


def health(server) -> tuple[int, str]:
    answer = httpx2.get(f"http://127.0.0.1:{server.port}/health", timeout=20)
    return answer.status_code, answer.json()["status"]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("state", ["queued", "decoding"])
def test_a_client_that_goes_frees_its_row_within_a_second(server, engine, wanted, stream, state):
    others = [engine.submit(PROMPT, zz.Sampling(2900)) for _ in range(2)] if state == "queued" else []
    until(lambda: engine.stats()["decoding"] == len(others))
    client = Raw(server.port, **LONG | {"stream": stream})
    until(lambda: engine.stats()[state] == (1 if state == "queued" else len(others) + 1))
    if stream and state == "decoding":
        client.until('"text":"')
    client.close()
    assert until(lambda: engine.stats()["cancelled"] == 1) < 1 and engine.stats()["queued"] == 0
    until(lambda: server.service.active == 0, 1)
    for other in others:
        other.cancel()
    assert post(server).json()["choices"][0]["text"] == wanted[0]


def test_who_reads_slowly_gets_all_and_holds_up_nobody(server, engine, wanted):
    slow = Raw(server.port, **SHORT | {"max_tokens": 500, "stream": True})
    slow.until('"text":"')
    assert post(server).json()["choices"][0]["text"] == wanted[0]
    until(lambda: engine.stats()["finished"] == 2)  # the engine has done its part, and the row is free
    assert engine.stats()["kv_bytes"] == 0 and server.service.active == 1
    stream = slow.rest()
    assert text_of(stream) == wanted[1] and stream.count("data: [DONE]") == 1


def test_who_reads_nothing_is_cancelled(engine, wanted):
    with live(Service(engine, "tiny", stall_seconds=0.2)) as server:
        slow = Raw(server.port, **LONG | {"stream": True})
        slow.until('"text":"')
        until(lambda: engine.stats()["cancelled"] == 1)
        assert engine.stats()["kv_bytes"] == 0
        stream = slow.rest()
        assert text_of(stream).startswith(wanted[1][:400]) and "nobody read its answer" in stream and "[DONE]" not in stream


def test_two_clients_at_once_have_the_tokens_that_they_have_alone(server, wanted):
    texts = [""] * 2

    def read(number, lines):
        texts[number] = text_of("\n".join(lines))

    fields = [SHORT | {"stream": True}, SHORT | {"max_tokens": 500, "stream": True}]
    url = f"http://127.0.0.1:{server.port}/v1/completions"
    with httpx2.stream("POST", url, json=fields[1], timeout=20) as second:
        rest = second.iter_lines()
        first = next(rest)
        with httpx2.stream("POST", url, json=fields[0], timeout=20) as short:
            read(0, short.iter_lines())
        read(1, [first, *rest])
    assert texts == wanted


def test_a_stream_that_waits_says_so_until_its_first_token(engine, wanted):
    others = [engine.submit(PROMPT, zz.Sampling(2900)) for _ in range(2)]
    with live(Service(engine, "tiny", ping_seconds=0.05)) as server:
        client = Raw(server.port, **SHORT | {"stream": True})
        client.until(": waiting for the first token\n\n")
        for other in others:
            other.cancel()
        stream = client.rest()
        assert text_of(stream) == wanted[0] and "data: [DONE]" in stream


def test_a_full_queue_is_429_and_tells_when_to_come_again(server, engine, wanted):
    others = [engine.submit(PROMPT, zz.Sampling(2900)) for _ in range(2)]
    until(lambda: engine.stats()["decoding"] == 2)
    others += [engine.submit(PROMPT, zz.Sampling(2900)) for _ in range(2)]
    answer = post(server)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert answer.json()["error"]["code"] == "queue_full" and health(server) == (200, "ok")
    for other in others:
        other.cancel()
    until(lambda: engine.stats()["queued"] == 0)
    assert post(server).json()["choices"][0]["text"] == wanted[0]


def test_the_end_waits_for_what_runs_and_takes_nothing_more(server, engine, wanted):
    client = Raw(server.port, **SHORT | {"max_tokens": 500, "stream": True})
    client.until('"text":"')
    server.handle_exit(signal.SIGTERM, None)
    assert health(server) == (503, "draining")
    answer = post(server)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
    stream = client.rest()
    assert text_of(stream) == wanted[1] and "data: [DONE]" in stream
    server.thread.join(20)
    assert not server.thread.is_alive() and server.error is None and engine.stats()["cancelled"] == 0
    with pytest.raises(zz.EngineStopped):
        engine.submit(PROMPT, zz.Sampling(1))
    with pytest.raises(httpx2.ConnectError):
        health(server)


def test_the_end_does_not_wait_for_who_reads_nothing(service, engine, monkeypatch, caplog):
    monkeypatch.setattr("zigzag_ext.serve.http.server._GRACE", 1)
    with live(service, drain_seconds=0.2) as server:
        slow = Raw(server.port, **SHORT | {"max_tokens": 500, "stream": True})
        until(lambda: engine.stats()["finished"] == 1)
        server.end()
        server.thread.join(5)
        assert not server.thread.is_alive() and "Traceback" not in caplog.text
        slow.close()


@pytest.mark.parametrize("how", ["too long", "a second signal"])
def test_the_end_cancels_what_takes_too_long(service, engine, how):
    with live(service, drain_seconds=0.3 if how == "too long" else 60) as server:
        clients = [Raw(server.port, **LONG | {"stream": stream}) for stream in (True, False)]
        clients[0].until('"text":"')
        until(lambda: engine.stats()["decoding"] == 2)
        start = time.monotonic()
        server.end()
        if how == "a second signal":
            server.handle_exit(signal.SIGINT, None)
        else:
            streamed, whole = (client.rest() for client in clients)
            assert "the server ends" in streamed and "[DONE]" not in streamed
            assert whole.startswith("HTTP/1.1 503") and '"code":"cancelled"' in whole
        server.thread.join(20)
        assert not server.thread.is_alive() and time.monotonic() - start < 3 and engine.stats()["cancelled"] == 2


def test_an_engine_that_an_error_ends_ends_its_server(model, tokenizer, monkeypatch):  # noqa: F811
    with zz.Engine(model, PLAN, max_len=3000, tokenizer=tokenizer) as engine, live(Service(engine, "tiny")) as server:

        def broken():
            raise OSError("the device is gone")

        monkeypatch.setattr(engine._steps, "step", broken)
        answer = post(server)
        assert answer.status_code == 503 and "the device is gone" in answer.json()["error"]["message"]
        server.thread.join(20)
        assert not server.thread.is_alive() and "was ended by OSError: the device is gone" in str(server.error)


def test_an_address_that_is_taken_or_nowhere_is_named():
    with bind("localhost", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot serve at localhost port {port}: Address already in use"):
            bind("localhost", port)
    with pytest.raises(OSError, match="there is no address 'no.such.host.invalid'"):
        bind("no.such.host.invalid", 1)


def test_many_clients_that_come_and_go_leave_nothing_behind(server, engine, wanted, request, record_property):
    """Some read to the end, some go at once, some in the middle; files and threads stay few, and answers as they were."""
    clients, turns = (8, 250) if request.config.getoption("--long") else (8, 6)
    post(server)
    files, wrong = open_files(), []

    def client(number):
        for turn in range(turns):
            kind = (number + turn) % 3
            raw = Raw(server.port, **SHORT | {"max_tokens": 60 if kind else 12, "stream": kind != 0})
            if kind == 0:
                answer = raw.rest()
                if not (answer.startswith("HTTP/1.1 429") or '"finish_reason":"length"' in answer):
                    wrong.append(answer)
            elif kind == 1:
                raw.until("HTTP/1.1 ")
            raw.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(600)
    until(lambda: server.service.active == 0)
    until(lambda: not any(engine.stats()[state] for state in ("queued", "prefilling", "decoding")), 1)
    assert not wrong and engine.stats()["failed"] == 0 and engine.stats()["cancelled"] > 0
    assert post(server).json()["choices"][0]["text"] == wanted[0]
    until(lambda: open_files() <= files)
    assert threading.active_count() < 60  # 40 read prompts, and stay
    record_property("count of requests of clients that come and go", clients * turns)
