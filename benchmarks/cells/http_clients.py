"""Clients of a server with OpenAI's API, which read streams of completions: light ones, that take little of a small machine."""

import asyncio
import json
import random
import time

from ..timing.token_times import Times, summary
from .serve_scenarios import Job

ROUNDS = 3  # requests of each client, one after the other
WORDS = 256  # w0 to w255 are the tokens of the served model


async def _stream(port: int, model: str, prompt: str, new: int) -> Times:
    """One request. Raises RuntimeError with what the server says unless all tokens come."""
    fields = {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}
    body = json.dumps(fields).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    times, said = Times(), b""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + body)
    while line := await reader.readline():
        said += line if len(said) < 2000 else b""
        if line.startswith(b"data: {") and any(choice.get("text") for choice in json.loads(line[6:]).get("choices", ())):
            times.note()
    writer.close()
    if not times.tokens or len(times.tokens) < new // 2:  # a server may put several tokens into one event
        raise RuntimeError(f"{len(times.tokens)} events for {new} tokens: {said.decode(errors='replace')}")
    return times


async def _client(port: int, model: str, job: Job, seed: int) -> list[Times]:
    draw, done = random.Random(seed), []
    for _ in range(ROUNDS):
        prompt = " ".join(f"w{draw.randrange(WORDS)}" for _ in range(job.prompt))
        done.append(await _stream(port, model, prompt, job.new))
    return done


def clients(port: int, model: str, job: Job) -> tuple[str, dict]:
    """`rows` clients at once, each with `ROUNDS` requests, behind one that warms the server up."""

    async def all_of_them():
        await _stream(port, model, "w1 w2 w3", job.new)
        start = time.perf_counter()
        found = await asyncio.gather(*(_client(port, model, job, seed) for seed in range(job.rows)))
        return start, [times for each in found for times in each]

    start, times = asyncio.run(all_of_them())
    fields = summary(times)
    wall = max(each.tokens[-1] for each in times) - start
    tokens = job.rows * ROUNDS * job.new  # events may have several
    return "server", fields | {"new_tokens": tokens, "wall_s": wall, "tokens_per_s": tokens / wall}
