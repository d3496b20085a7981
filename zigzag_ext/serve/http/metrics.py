"""What /metrics tells, by the library prometheus_client."""

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from ..engine import Engine
from ..request import Token
from ..scheduler import ENDED

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)  # seconds
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Of one engine and its server, in a registry of their own."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.registry.register(_OfEngine(engine))
        made = {"registry": self.registry}
        self.responses = Counter("zigzag_responses", "Answers to requests under /v1, by HTTP status.", ["code"], **made)
        self.first = Histogram("zigzag_ttft_seconds", "From a request to its first token.", buckets=_FIRST, **made)
        self.between = Histogram("zigzag_itl_seconds", "From one token of a request to its next.", buckets=_BETWEEN, **made)

    def clock(self) -> Callable[[Token], None]:
        """An `on_token` of a request that comes now. It is called in the engine's thread: what readers do moves no number."""
        last, histogram = time.perf_counter(), self.first

        def note(token: Token) -> None:
            nonlocal last, histogram
            now = time.perf_counter()
            histogram.observe(now - last)
            last, histogram = now, self.between

        return note

    def text(self, accept: str) -> tuple[bytes, str]:
        """All of it, and its content type, in the format that a header `Accept` asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


class _OfEngine:
    """`Engine.stats()` as metrics."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self.engine.stats()
        requests = CounterMetricFamily("zigzag_requests", "Requests that have ended, by how.", labels=["state"])
        for state in ENDED:
            requests.add_metric([state], stats[state])
        tokens = CounterMetricFamily("zigzag_tokens", "Tokens that were read of prompts, and generated.", labels=["kind"])
        what = "What requests take now, what is kept for prompts to come, and rings, which are there from the start."
        memory = GaugeMetricFamily("zigzag_kv_bytes", what, labels=["kind"])
        for family, kind, name in [
            (tokens, "prompt", "prompt_tokens"), (tokens, "generated", "tokens"),
            (memory, "requests", "kv_bytes"), (memory, "kept", "cached_bytes"), (memory, "rings", "ring_bytes"),
        ]:  # fmt: skip
            family.add_metric([kind], stats[name])
        hits = "Tokens of prompts that were not read, since an earlier request had left them."
        yield CounterMetricFamily("zigzag_prefix_hit_tokens", hits, stats["cached_tokens"])
        running = stats["prefilling"] + stats["decoding"]
        yield from (requests, tokens, memory, CounterMetricFamily("zigzag_steps", "Steps of the engine.", stats["steps"]))
        yield GaugeMetricFamily("zigzag_requests_running", "Requests that run.", running)
        yield GaugeMetricFamily("zigzag_requests_waiting", "Requests that wait to be admitted.", stats["queued"])
        yield GaugeMetricFamily("zigzag_kv_reserved_bytes", "What running requests may come to take.", stats["reserved_bytes"])
        yield GaugeMetricFamily("zigzag_kv_budget_bytes", "What requests and what is kept may take.", stats["budget_bytes"])
