"""What is compared, checked against a model's config: everything that can be wrong before the model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...planning.costs import head_ms_costs, ms_costs
from ...planning.native import native_windows
from ...planning.origin import check_geometry, known, origin_of
from ...planning.scores import load_scores
from ..evaluate import RulerTask, Task
from ..identify import METHODS
from ..identify.own import load_function
from ..lm_eval import require_lm_eval

LEVELS = ("layer", "head")
BUDGETS = ("kv_bytes", "ms")
EVEN = "even"  # the method without scores: retrieval layers spread evenly
FULL = "full"  # the line of the model's own attention
_MOST_CONTEXT = 131072


@dataclass(frozen=True)
class Source:
    """Where scores are from: a method of `identify`, a function elsewhere, a file, or nothing (`EVEN`)."""

    label: str  # that results and figures show
    method: str | None = None  # as `identify` takes it
    path: Path | None = None  # scores that are there already


def sources_of(names: Sequence[str], **options) -> tuple[Source, ...]:
    """The sources that these names mean. options: what `identify` will be given beside sink, window and seed.

    Raises:
        ValueError: a name is no method, function or file; a function cannot be imported or called; or two have one label.
    """
    sources = tuple(_source_of(name, options) for name in names)
    labels = [source.label for source in sources]
    if not labels or len(set(labels)) != len(labels) or FULL in labels:
        raise ValueError(f"methods are told apart by their names (files without their ending), which must differ: {labels}")
    return sources


def _source_of(name: str, options: dict) -> Source:
    if name == EVEN:
        return Source(EVEN)
    if name in METHODS:
        return Source(name, method=name)
    path = Path(name)
    if path.exists():
        if not path.stem.isprintable():
            raise ValueError(f"the results name scores by their file, so that name must be printable, got {name!r}")
        return Source(path.stem, path=path)
    if ":" in name:
        load_function(name, **options)
        return Source(name, method=name)
    raise ValueError(
        f"unknown method {name!r}; supported: {', '.join([*METHODS, EVEN])}, package.module:function, or a score file"
    )


@dataclass(frozen=True)
class Settings:
    """A comparison.

    ratios: shares of retrieval layers, each of which gives a budget, see `plans.choices`. context: tokens at which KV bytes and
    milliseconds count; None: the model's context, 131072 at most. costs: a cost table's file; None: it is measured.
    lengths, depths, prompts, seed: as tasks take them. tokens, samples: `tokens` and `prompts` of `identify`.
    """

    sources: tuple[Source, ...]
    ratios: tuple[float, ...] = (0.25, 0.5, 0.75)
    levels: tuple[str, ...] = LEVELS
    budgets: tuple[str, ...] = BUDGETS
    tasks: tuple[Task | RulerTask, ...] = ()
    lengths: tuple[int, ...] = (1024,)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    prompts: int = 10
    seed: int = 0
    sink: int = 64
    window: int = 256
    context: int | None = None
    costs: Path | None = None
    tokens: int | None = None
    samples: int | None = None

    def tokens_of(self, config) -> int:
        """The context that bytes and milliseconds count at."""
        limit = getattr(config, "max_position_embeddings", None) or _MOST_CONTEXT
        return self.context if self.context is not None else min(limit, _MOST_CONTEXT)

    def check(self, config) -> None:
        """Raises ValueError unless a model with this config can be compared so; ModuleNotFoundError for RULER without lm_eval."""
        for name, given, known_ones in (("level", self.levels, LEVELS), ("budget", self.budgets, BUDGETS)):
            if wrong := [each for each in given if each not in known_ones]:
                raise ValueError(f"unknown {name} {wrong[0]!r}; supported: {', '.join(known_ones)}")
        for name in ("ratios", "levels", "budgets", "tasks", "lengths", "depths"):
            if not (given := getattr(self, name)) or len(set(given)) != len(given):
                raise ValueError(f"{name} must be one or more different values, got {given}")
        for name, shares in (("ratio", self.ratios), ("depth", self.depths)):
            if wrong := [share for share in shares if not 0 <= share <= 1]:
                raise ValueError(f"a {name} must lie in [0, 1], got {wrong[0]}")
        if any(isinstance(task, RulerTask) for task in self.tasks):
            require_lm_eval()
        for name, least in (("sink", 0), ("window", 1), ("prompts", 1), ("context", 1)):
            value = self.tokens_of(config) if name == "context" else getattr(self, name)
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and max(self.lengths) > limit:
            raise ValueError(f"{max(self.lengths)} tokens are more than the model's context of {limit}")
        if self.levels == ("head",) and any(source.label == EVEN for source in self.sources):
            raise ValueError(f"{EVEN} spreads whole layers: it needs the level layer")
        self._check_files(config)

    def _check_files(self, config) -> None:
        geometry = origin_of(config) | {"layers": native_windows(config).count(None)}
        for source in self.sources:
            if source.path is not None:
                scores = load_scores(source.path)
                check_geometry(known(scores.origin), geometry, f"{source.path}: scores are for")
        if self.costs is not None:
            context, layers = self.tokens_of(config), geometry["layers"]
            ms_costs(self.costs, context, layers)
            if "head" in self.levels:
                head_ms_costs(self.costs, context, layers, geometry["kv_heads"])


def zeros_for(config) -> np.ndarray:
    """Scores that say nothing, [full-attention layers, kv_heads]."""
    return np.zeros((native_windows(config).count(None), origin_of(config)["kv_heads"]))
