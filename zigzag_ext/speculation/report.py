"""What a call of speculative decoding did: rounds, drafts and times, and what decided about drafts."""

from dataclasses import dataclass, field, fields

SOURCES = ("lookup", "streaming")


@dataclass
class Report:
    """Counts and times of one `generate()` call, over all rows; of several, added up.

    rounds: forwards behind the prompt. tokens: emitted ones, that of the prompt's forward included. row_rounds: rounds times rows
    that still went on. drafted, accepted: tokens by source. prompt_ms, rounds_ms: wall time of the prompt's forward and of all
    rounds. kind_rounds, kind_ms: rounds and wall time by what was drafted: "plain", "lookup", "streaming", "both". kv_bytes,
    weight_bytes: what a plain step read in the end. gains: what the policy last expected of a source, as tokens per second over
    those of plain rounds. prompts: rows.
    """

    draft: str
    rounds: int = 0
    row_rounds: int = 0
    tokens: int = 0
    drafted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SOURCES, 0))
    accepted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SOURCES, 0))
    prompt_ms: float = 0.0
    rounds_ms: float = 0.0
    kind_rounds: dict[str, int] = field(default_factory=dict)
    kind_ms: dict[str, float] = field(default_factory=dict)
    kv_bytes: int = 0
    weight_bytes: int = 0
    gains: dict[str, float] = field(default_factory=dict)
    prompts: int = 0

    def __add__(self, other: "Report") -> "Report":
        """Both calls together: counts and times are added, what a step read and gains are those of the later one."""
        added = {}
        for each in fields(self):
            ours, theirs = getattr(self, each.name), getattr(other, each.name)
            if isinstance(ours, dict) and each.name != "gains":
                theirs = {key: ours.get(key, 0) + theirs.get(key, 0) for key in {**ours, **theirs}}
            elif isinstance(ours, int | float) and each.name not in ("kv_bytes", "weight_bytes"):
                theirs = ours + theirs
            added[each.name] = theirs
        return Report(**added)

    def acceptance(self, source: str | None = None) -> float:
        """Share of the drafted tokens that were kept, of one source or of all; 0 where nothing was drafted."""
        sources = SOURCES if source is None else (source,)
        drafted = sum(self.drafted[name] for name in sources)
        return sum(self.accepted[name] for name in sources) / drafted if drafted else 0.0

    @property
    def tokens_per_round(self) -> float:
        """Tokens that a row emits per round, on average; 1 is plain decoding."""
        return (self.row_rounds + sum(self.accepted.values())) / self.row_rounds if self.row_rounds else 0.0

    @property
    def ms_per_round(self) -> float:
        return self.rounds_ms / self.rounds if self.rounds else 0.0

    def __str__(self) -> str:
        lines = [
            f"draft={self.draft}: {self.tokens} tokens in {self.rounds} rounds, {self.tokens_per_round:.2f} per row and round, "
            f"{self.ms_per_round:.2f} ms a round; prompt {self.prompt_ms:.0f} ms"
        ]
        for name in SOURCES:
            if self.drafted[name]:
                lines.append(
                    f"{name}: {self.accepted[name]} of {self.drafted[name]} drafted tokens ({self.acceptance(name):.2f})"
                )
        kinds = (f"{kind} {self.kind_ms[kind] / n:.2f} ms x {n}" for kind, n in self.kind_rounds.items())
        lines.append(f"rounds: {', '.join(kinds)}" if self.kind_rounds else "rounds: none")
        gains = "".join(f", {name} expected {gain:.2f}x" for name, gain in self.gains.items())
        read = f"{self.kv_bytes / 1e6:,.1f} MB of KV, {self.weight_bytes / 1e6:,.1f} MB of weights"
        lines.append(f"a plain step reads {read}{gains}")
        return "\n".join(lines)
