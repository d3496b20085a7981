"""Times speculative decoding of a whole model, at faked contexts:  python -m benchmarks.speculate --csv speculate.csv

Weights are random and so is the text, which nobody could draft. So acceptance is injected: a drafted token is taken for right
with a given chance, whatever it is, and lookups draft random tokens. Everything else is what users run: the drafts are made, all
are verified, rows take back what was wrong. Contexts are faked as in benchmarks.step. Beside rounds, the parts are timed alone:
forwards of 4, 8 and 16 tokens, and steps of the streaming draft, at this and at a short context. "magicdec" drafts with a cache
of its own (peers/magicdec_recreation.py), whose prompt is not in the times. "transformers_lookup" is transformers' own lookup,
over the stock model, eager, one row. A run that was interrupted goes on where it stopped.
"""

import argparse
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import transformers

import zigzag_ext as zz
from zigzag_ext.hf.cache_argument import cache_argument
from zigzag_ext.hf.session import session_of
from zigzag_ext.speculation import accept, loop
from zigzag_ext.speculation.chain import StreamingDraft
from zigzag_ext.speculation.lookup import Lookup
from zigzag_ext.speculation.loop import BUCKETS

from .cells.arguments import model_parser
from .cells.fake_context import fake_zigzag
from .cells.models import PLANS, K, build_model, even_plan, make_plan
from .peers.magicdec_recreation import OwnCacheDraft
from .peers.transformers_lookup import LookupPeer
from .report.records import SpeculateRecord, held, writer
from .timing import machine
from .timing.model_memory import kv_bytes, peak_bytes, weight_bytes
from .timing.profile_gpu import wait

NEW, WARM_UP = 128, 40  # tokens of a measured call, and of the call before it
STEPS = 20  # of a part that is timed alone
WINDOW = 1024  # of the streaming draft
CHAIN = 8  # draft steps that are timed together, as they run
ROLLBACK = max(BUCKETS)
QUOTED = 0.645  # chance at which 7 drafted tokens are 2.75 emitted ones per round
# What is drafted, most tokens of a draft, chance of a token to be right; None: lookups find nothing.
ROUNDS = (
    ("off", 1, 0.0),
    ("streaming", 3, 0.8),
    ("streaming", 7, 0.8),
    ("streaming", 3, 0.9),
    ("lookup", 7, QUOTED),
    ("lookup", 7, None),
    ("magicdec", 3, 0.8),
    ("auto", 7, 0.0),
)
LAST = {"transformers_lookup": "lookup"}  # the draft that a cell ends with; of ours, "auto"


@contextmanager
def injected(draft: str, chance: float | None) -> Iterator[None]:
    """Drafted tokens are right with this chance, and lookups always find something."""
    before = loop.accept_greedy, Lookup.draft, loop.StreamingDraft

    def accept_some(scores, tokens, counts):
        best = scores.argmax(-1)
        last = accept.last_confirmed(torch.rand(tokens[:, 1:].shape, device=tokens.device) < chance, counts)
        return torch.cat([tokens[:, 1:], last, best.gather(1, last)], 1)

    search = Lookup.draft
    if draft == "magicdec":
        loop.StreamingDraft = OwnCacheDraft
    if chance is None:
        Lookup.draft = lambda self, most: search(self, most)[:0]  # random weights may repeat themselves
    else:
        loop.accept_greedy = accept_some
        if draft == "lookup":
            Lookup.draft = lambda self, most: self.tokens[:most]
    try:
        yield
    finally:
        loop.accept_greedy, Lookup.draft, loop.StreamingDraft = before


class Rows:
    """A model, a cache of `batch` rows of faked contents, and the text that it is said to hold."""

    def __init__(self, model, plan: zz.Plan, context: int, batch: int):
        margin = 2 * len(ROUNDS) * (NEW + WARM_UP) + 4 * ROLLBACK
        self.model, self.cache = model, fake_zigzag(model, plan, context, margin, batch, ROLLBACK)
        self.ids = torch.randint(0, model.config.vocab_size, (batch, context + 1), device=model.device)

    def generate(self, new_tokens: int, **options) -> float:
        """Milliseconds of a call that goes on where the last one stopped."""
        options |= cache_argument(self.model, self.cache) | {"do_sample": False, "eos_token_id": None}
        options |= {"attention_mask": torch.ones_like(self.ids), "max_new_tokens": new_tokens}

        def call():
            self.ids = self.model.generate(self.ids, **options)

        return wall_ms(self.model, call)

    def verify(self, tokens: int) -> float:
        """Milliseconds of a forward of `tokens` new tokens per row, all of which are taken back."""
        batch, session = len(self.ids), session_of(self.model)
        ids = self.ids[:, -1:].expand(-1, tokens).contiguous()
        positions = self.cache.seq_lens[:, None] + torch.arange(tokens, device=ids.device)

        def forward():
            session.step(self.cache, [tokens] * batch, input_ids=ids, position_ids=positions, use_cache=True, return_dict=True)
            self.cache.crop([-tokens] * batch)

        return median_ms(self.model, forward)

    def draft(self) -> float:
        """Milliseconds of one step of the streaming draft."""
        chain = StreamingDraft(session_of(self.model), self.cache, WINDOW)
        latest, offset = self.ids[:, -1], torch.zeros(len(self.ids), dtype=torch.long, device=self.ids.device)

        def choose(logits, drafts, step):
            return logits.argmax(-1), None

        return median_ms(self.model, lambda: chain(latest, [CHAIN] * len(latest), offset, choose)) / CHAIN


def wall_ms(model, run: Callable[[], None]) -> float:
    wait(model)
    start = time.perf_counter()
    run()
    wait(model)
    return (time.perf_counter() - start) * 1e3


def median_ms(model, run: Callable[[], None]) -> float:
    return statistics.median([wall_ms(model, run) for _ in range(3 + STEPS)][3:])


def measure(rows: Rows, short: Callable[[], Rows]) -> Iterator[dict]:
    """Every measurement of one context, plan and batch. short: rows of a short context."""
    nothing = {"draft": "-", "acceptance": 0.0, "rounds": 0}
    rows.generate(WARM_UP)
    few, many = rows.generate(4), rows.generate(4 + NEW)
    plain = (many - few) / NEW
    yield {"phase": "generate", "wall_ms": plain, "tokens": 0, "ms_per_token": plain, **nothing}
    for tokens in BUCKETS:
        ms = rows.verify(tokens)
        yield {"phase": "verify", "wall_ms": ms, "tokens": tokens, "ms_per_token": ms, **nothing}
    for name, where in (("streaming", rows), ("streaming, 1K", short())):
        ms = where.draft()
        yield {"phase": "draft", "wall_ms": ms, "tokens": 1, "ms_per_token": ms, **nothing | {"draft": name}}
    for draft, tokens, chance in ROUNDS:
        with injected(draft, chance):
            source = "streaming" if draft == "magicdec" else draft
            rows.generate(WARM_UP, custom_generate=zz.speculate(source, tokens, WINDOW))
            speculation = zz.speculate(source, tokens, WINDOW)
            rows.generate(NEW, custom_generate=speculation)
        report = speculation.report
        yield {
            "phase": "round", "wall_ms": report.ms_per_round, "draft": draft if chance is not None else f"{draft}, no match",
            "tokens": tokens, "acceptance": chance or 0.0, "rounds": report.rounds, "ms_per_token": report.rounds_ms / (NEW - 1),
        }  # fmt: skip


def measure_peer(peer: LookupPeer) -> Iterator[dict]:
    """Rounds of transformers' own lookup, with drafts as right as those of ours that are quoted."""
    tokens, timed = 7, partial(wall_ms, peer.model)
    peer.generate(WARM_UP, tokens, QUOTED, timed)
    rounds, ms = peer.generate(NEW, tokens, QUOTED, timed)
    yield {
        "phase": "round", "wall_ms": ms / rounds, "draft": "lookup", "tokens": tokens, "acceptance": QUOTED, "rounds": rounds,
        "ms_per_token": ms / NEW,
    }  # fmt: skip


def cells(args: argparse.Namespace, model) -> Iterator[tuple[tuple, Callable[[], tuple]]]:
    """(impl, plan, context, batch), and what makes the rows of that cell and their measurements."""
    impl = "zigzag_eager" if args.eager else "zigzag_compiled"
    plan = make_plan(args.plan, model.config)

    def ours(context: int, batch: int):
        rows = Rows(model, plan, context, batch)
        return rows, measure(rows, partial(Rows, model, plan, K, batch))

    def theirs(context: int):
        peer = LookupPeer(model, context)
        return peer, measure_peer(peer)

    with zz.zigzag(model, even_plan(model.config.num_hidden_layers, 1.0), compile=not args.eager):
        for context, batch in itertools.product(args.context, args.batch):
            yield (impl, args.plan, context, batch), partial(ours, context, batch)
    for context in args.context:
        yield ("transformers_lookup", "full", context, 1), partial(theirs, context)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    def numbers(text):
        return [int(n) for n in text.split(",")]

    parser = model_parser(__doc__, "speculate")
    parser.add_argument("--context", type=numbers, default=[128 * K], help="tokens, separated by commas; default 128K")
    parser.add_argument("--batch", type=numbers, default=[1, 4, 8], help="rows, separated by commas; default 1, 4, 8")
    parser.add_argument("--plan", choices=list(PLANS), default="exclusive_50")
    parser.add_argument("--eager", action="store_true", help="without compiled steps")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    origin = {"commit": args.commit, "gpu": machine.processor(args.device), "driver": machine.driver(args.device)}
    origin |= {"torch": torch.__version__, "transformers": transformers.__version__, "model": args.model}
    ends = held(args.csv, SpeculateRecord, origin)  # each cell's last measurement is what it is known by
    done = {(row.impl, row.plan, row.context, row.batch) for row in ends if row.draft == LAST.get(row.impl, "auto")}
    model = build_model(args.model, args.device)
    with torch.no_grad(), writer(args.csv, SpeculateRecord, go_on=True) as add:
        for cell, prepare in cells(args, model):
            if cell in done:
                print(*cell, f"in {args.csv} already", flush=True)
                continue
            impl, plan, context, batch = cell
            rows, measurements = prepare()
            for row in measurements:
                memory = {"kv_bytes": kv_bytes(rows.cache), "peak_bytes": peak_bytes(model, rows.cache)}
                memory |= {"weight_bytes": weight_bytes(model), "gpu_ms": 0.0, "launches": 0.0}
                add(SpeculateRecord(**origin, plan=plan, impl=impl, context=context, batch=batch, **memory, **row))
                times = f"{row['wall_ms']:8.2f} ms wall, {row['ms_per_token']:8.2f} ms a token, {row['rounds']:4} rounds"
                what = f"{row['phase']:9} {row['draft']:18} {row['tokens']:3} {row['acceptance']:.3f}"
                print(f"{impl} {context:7} x {batch} {what} {times}", flush=True)
            del rows, measurements, prepare
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
