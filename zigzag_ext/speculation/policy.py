"""What a round drafts: by rule, by measured times of rounds, and by how many drafts were right so far."""

from .report import SOURCES, Report

LEAST_GAIN = 1.05  # expected tokens per second over those of plain rounds, below which "auto" does not draft
LEAST_KV = 2.0  # bytes of KV over bytes of weights, below which the streaming draft cannot pay: its own step costs too much
STREAMING_TOKENS = 3  # that "auto" drafts by streaming: the best number for acceptances of 0.7 to 0.87 (docs/speculation.md)
FIRST_PLAIN = 4  # rounds after which "auto" takes a plain one to know its time, if none came by itself
PROBE, LONGEST_PAUSE = 16, 256  # rounds after which what did not pay is tried again; twice as many each time, up to the second
# Right tokens per row before any draft was judged: a few failures must not decide.
FIRST_GUESS = {"lookup": 2.0, "streaming": 1.5}
_WEIGHT = {"lookup": 0.2, "streaming": 0.4}  # of the latest round in their averages; matches vary more, and cost less to try
_WEIGHT_OF_TIME = 0.2


class Policy:
    """Decides, for each round, how many tokens a source may draft. `observe` is told of every round.

    With a fixed `draft` its source is always asked. "auto" asks for what gains: (1 + kept drafts per row) x ms of a plain round /
    ms of a round with this source is at least LEAST_GAIN. The streaming draft also needs KV bytes of LEAST_KV times the weights'.
    """

    def __init__(self, draft: str, tokens: int):
        self.draft, self.tokens, self.rounds = draft, tokens, 0
        self.kept = dict(FIRST_GUESS)  # by source: right tokens per row, averaged over rounds in which it drafted
        self.ms: dict[str, float] = {}  # of a round, by kind, averaged
        self.seen: set[tuple[str, int]] = set()  # kinds and columns that ran before: the first of each may compile
        self.pause = dict.fromkeys(SOURCES, PROBE)
        self.idle_until = dict.fromkeys(SOURCES, 0)

    def tokens_for(self, source: str, kv_bytes: int = 0, weight_bytes: int = 0) -> int:
        """Most tokens that `source` may draft in this round."""
        if self.draft != "auto":
            return self.tokens if self.draft == source else 0
        if source == "streaming" and kv_bytes < LEAST_KV * weight_bytes:
            return 0
        times_plain = "plain" not in self.ms and self.rounds >= FIRST_PLAIN  # two rounds: the first may compile
        if times_plain or self.rounds < self.idle_until[source]:
            return 0
        return self.tokens if source == "lookup" else min(self.tokens, STREAMING_TOKENS)

    def gain(self, source: str) -> float | None:
        """Expected tokens per second with this source over those of plain rounds; None before both were timed."""
        if "plain" not in self.ms or source not in self.ms:
            return None
        return (1 + self.kept[source]) * self.ms["plain"] / self.ms[source]

    def observe(self, kind: str, q_len: int, ms: float, rows: int, drafts: dict[str, int], kept: dict[str, int]) -> None:
        """A round of `rows` rows is over. kind: "plain", a source or "both". drafts, kept: drafts and right tokens, by source."""
        self.rounds += 1
        if (kind, q_len) in self.seen:
            before = self.ms.get(kind, ms)
            self.ms[kind] = before + _WEIGHT_OF_TIME * (ms - before)
        self.seen.add((kind, q_len))
        for source in SOURCES:
            if drafts[source]:
                self.kept[source] += _WEIGHT[source] * (kept[source] / rows - self.kept[source])
                self._judge(source)

    def summarise(self, report: Report) -> None:
        report.gains = {source: gain for source in SOURCES if (gain := self.gain(source)) is not None}

    def _judge(self, source: str) -> None:
        gain = self.gain(source)
        if gain is None or gain >= LEAST_GAIN:
            self.pause[source] = PROBE
        else:
            self.idle_until[source] = self.rounds + self.pause[source]
            self.pause[source] = min(2 * self.pause[source], LONGEST_PAUSE)
