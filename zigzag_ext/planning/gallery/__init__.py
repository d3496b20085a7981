"""The gallery: plans for models by name, from head scores that others have published, with what is known of their worth.

`index.json` lists the sources (whose score, where from, version and date, licence, what was measured, the sink and window that it
was made for) and the plans: a model, its other names (`same`: the same weights; `finetunes`: further trained, by their model
cards, so their scores may differ), and one of
    scores: a table of head scores beside the index, with its origin (`planning/scores.py`), where the licence lets it be shipped;
    order: all layers, best first by mean head score, where it does not: what follows from scores that are not here;
    streaming: the layers of one published plan.
A model may have plans of several sources; the first is the default. NOTICE.md has the notices that the licences ask for.
"""

import difflib
import os
import shlex
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

from ..plan import Plan
from ..reading import read_json, shown
from ..scores import Scores, load_scores
from ..solve import solve

_FOLDER = Path(__file__).parent
_OF_SCORES = ("objective_value", "retained_score", "mask_distance", "mask_heads", "layer_values", "scores")


@dataclass(frozen=True)
class Entry:
    """A model's plans by one source. One of `scores`, `order` and `streaming` is given: see the module."""

    model: str
    source: str  # a name, unique for the model
    score: str  # what was scored, and by whom
    method: str  # the nearest one of `zigzag_ext.identify`
    url: str
    version: str
    date: str  # of that version
    licence: str
    measured: str  # which quality of which plans was measured, by whom
    sink: int
    window: int
    same: tuple[str, ...] = ()
    finetunes: tuple[str, ...] = ()
    scores: str | None = None
    order: tuple[int, ...] | None = None
    streaming: tuple[int, ...] | None = None
    origin: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def ratios(self) -> tuple[float, float]:
        """The smallest and the largest retrieval_ratio of the plans."""
        return (0.0, 1.0) if self.streaming is None else (1 - len(self.streaming) / self.origin["layers"],) * 2

    def plan(self, retrieval_ratio: float | None, sink: int, window: int) -> Plan:
        """The plan itself, with what `solve` records of it. Raises as `load_plan`."""
        if self.scores is not None:
            return solve(load_scores(_FOLDER / self.scores), retrieval_ratio, sink=sink, window=window)
        layers, heads = self.origin["layers"], self.origin["kv_heads"]
        if self.streaming is not None:
            if retrieval_ratio not in (None, (own := self.ratios[0])):
                raise ValueError(f"{self.model} has one published plan, of retrieval_ratio {own:g}; got {retrieval_ratio!r}")
            kinds = ["streaming" if layer in self.streaming else "retrieval" for layer in range(layers)]
            return Plan(kinds, sink=sink, window=window, provenance={"origin": self.origin})
        rank = {layer: place for place, layer in enumerate(self.order)}
        ranks = Scores([[1 - rank[layer] / layers] * heads for layer in range(layers)], self.origin)
        plan = solve(ranks, retrieval_ratio, sink=sink, window=window)
        recorded = {name: value for name, value in plan.provenance.items() if name not in _OF_SCORES}  # those are of ranks
        return replace(plan, provenance=recorded)


@lru_cache
def entries() -> tuple[Entry, ...]:
    """Everything that the gallery has, a model's default source first."""
    index = read_json(_FOLDER / "index.json", "the gallery's index")
    fields = ({"source": plan["source"], **index["sources"][plan["source"]], **plan} for plan in index["plans"])
    return tuple(Entry(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}) for entry in fields)


def load_plan(
    model: str | os.PathLike,
    retrieval_ratio: float | None = None,
    *,
    source: str | None = None,
    sink: int | None = None,
    window: int | None = None,
) -> Plan:
    """A plan for a model by name, from published scores. A start, not a result: measure it on your task before you rely on it.

    Args:
        model: the model's name on the Hugging Face hub, such as "meta-llama/Llama-3.1-8B-Instruct", or a folder of that name. Who
            published the weights again under the same name, and upper and lower case, make no difference. Of some models
            fine-tunes are known, too: they get the plan of the model that was scored.
        retrieval_ratio: share of layers that retrieve, in [0, 1]; 0.5 where it is not given, or a published plan's own.
        source: whose scores, where there are several (`zigzag plans` lists them); the first one by default.
        sink, window: tokens that streaming layers keep; by default what the source's scores were made or evaluated with.

    Returns:
        The plan of `solve(scores, retrieval_ratio)`, objective "mean". Beside what `solve` records, its provenance says
        which scores it is from, where they are published, their licence, what was measured and how to check it. Its origin has
        the model's geometry, so that `zigzag_ext.enable` refuses another one; of a fine-tune it names the model that was scored.

    Raises:
        ValueError: there are no scores for the model (the message says how to make them and how long that takes), or none by
            `source`; the ratio is outside [0, 1], or not the one of a published plan. TypeError: an argument has the wrong type.

    Example:
        >>> plan = load_plan("meta-llama/Llama-3.1-8B-Instruct", retrieval_ratio=0.5)
        >>> len(plan.streaming_layers), plan.origin["model"], plan.provenance["licence"]
        (16, 'meta-llama/Llama-3.1-8B-Instruct', 'MIT')
    """
    if not isinstance(model, str | os.PathLike):
        raise TypeError(f"model must be a model's name or folder, got {shown(model)}")
    model = os.fspath(model)
    entry, same = _find(model, source)
    plan = entry.plan(retrieval_ratio, entry.sink if sink is None else sink, entry.window if window is None else window)
    known = {
        "source": f"{entry.score}: {entry.url}, {entry.version} of {entry.date}",
        "licence": entry.licence,
        "measured": entry.measured,
        "check": f"zigzag eval {shlex.quote(model)} --plan FILE",
    }
    if not same:
        known["scored_model"] = f"{entry.model}; {model} was trained further, which may have moved what its heads do"
    origin = plan.provenance["origin"] | ({"model": model} if same else {})
    return replace(plan, provenance={**known, **plan.provenance, "origin": origin})


def scores_of(model: str | os.PathLike, source: str | None = None) -> Scores:
    """The scores behind a model's plans, for `solve` with other budgets and objectives.

    Returns:
        float64 [layers, kv_heads] in [0, 1]. Where a source scores layers only, a layer's score stands for each of its heads.

    Raises:
        ValueError: as `load_plan`; or the source's scores are not here, for want of a licence or because there are none.
    """
    entry, _ = _find(os.fspath(model), source)
    if entry.scores is None:
        what = f"the scores of {entry.source!r} for {entry.model} are not shipped"
        raise ValueError(f"{what} (licence: {entry.licence}): {entry.url}")
    return load_scores(_FOLDER / entry.scores)


def _find(model: str, source: str | None) -> tuple[Entry, bool]:
    """The entry for a model, and whether it has the weights that were scored."""
    # As `origin.other_model` has it, a hub name and a folder of that name are one model.
    full, last = model.casefold(), PurePath(model).name.casefold()

    def having(names) -> bool:
        return any(full == name.casefold() or last == PurePath(name).name.casefold() for name in names)

    same = [entry for entry in entries() if having((entry.model, *entry.same))]
    found = same or [entry for entry in entries() if having(entry.finetunes)]
    if not found:
        raise ValueError(_unknown(model))
    for entry in found:
        if source in (None, entry.source):
            return entry, bool(same)
    raise ValueError(f"there are no scores of {model} by {shown(source)}; supported: {', '.join(e.source for e in found)}")


def _unknown(model: str) -> str:
    """What to do without scores. Prompts and times are those of `identify`'s default method, the times from docs/evidence.md."""
    if model.endswith(".json") and Path(model).is_file():
        return f"{model} is a file: Plan.load reads plan files, the gallery knows models by name"
    names = sorted({name for entry in entries() for name in (entry.model, *entry.same, *entry.finetunes)})
    near = difflib.get_close_matches(model, names, n=1)
    return (
        f"the gallery has no plan for {shown(model)}{f' (it has one for {near[0]})' if near else ''}; `zigzag plans` lists its "
        f"models. To make scores: zigzag identify {shlex.quote(model)} -o scores.tsv, then zigzag solve scores.tsv -o plan.json. "
        "That reads 16 prompts of 2048 tokens: for a model of 135M parameters 146 s on two CPU cores or seconds on a GPU, for "
        "others about in proportion to their parameters. A model with sliding windows of its own needs no plan to keep just "
        "those: zigzag_ext.enable(model)"
    )
