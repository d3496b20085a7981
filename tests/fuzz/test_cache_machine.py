"""Any sequence of uses, failures and interrupts of a cache, against plain lists of tokens.

After every step the cache answers like a fresh one that is given the same tokens, or the step was refused as documented and
changed nothing, or the cache demands `reset()`. Nine tenths of FUZZ_SECONDS are how long it goes on, with other sequences each
time; unset: a few sequences, always the same. `make fuzz` runs an hour.
"""

import collections
import contextlib
import copy
import os
import tempfile
import time

import pytest
import torch
from faults import FAULTS, Injected, injected
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from interrupts import Places
from rows import SKIP, Rows, arguments, new_rows
from tiny_models import generate, new_model

import zigzag_ext as zz
from zigzag_ext.attention import store
from zigzag_ext.cache import cache as cache_module

MIXED = [("retrieval", "streaming"), "streaming", "retrieval"]
KINDS = [["streaming", "retrieval", "streaming"], MIXED, ["retrieval"] * 3, ["streaming"] * 3]
FORMATS = [{}, {}, {}, {"kv_format": "int8"}, {"kv_format": "fp8", "ring_kv_format": "int8"}, {"kv_format": "int4"},
           {"kv_format": "int8", "key_smoothing": True}]  # fmt: skip
MOST_ROWS, MOST_COLUMNS = 4, 160
SEEDS = st.integers(0, 1 << 30)
counts = collections.Counter()


class CacheMachine(RuleBasedStateMachine):
    models: dict = {}

    @initialize(
        kinds=st.sampled_from(KINDS),
        formats=st.sampled_from(FORMATS),
        sink=st.sampled_from([0, 1, 4]),
        window=st.sampled_from([1, 5, 16]),
        rollback=st.sampled_from([0, 3, 20]),
        max_len=st.sampled_from([None, None, 40, 100]),
        chunk=st.sampled_from([None, 7, 20]),
        growth=st.sampled_from([4, 16, 256]),
    )
    def start(self, kinds, formats, sink, window, rollback, max_len, chunk, growth):
        """Retrieval layers grow in small steps, and move after few of them, unless growth is what it is outside of tests."""
        counts["cases"] += 1
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(cache_module, "GROWTH_STEP", growth)
        if growth < 256:
            self.patch.setattr(store, "_FIRST_TOKENS", 4 * growth)
        self.plan = zz.Plan(kinds, sink=sink, window=window, **formats)
        self.rollback, self.max_len, self.streams = rollback, max_len, kinds != KINDS[2]
        self.grows = kinds != KINDS[3]
        self.slots = sink + window + rollback
        self.model, self.fresh_model = self.models[chunk], self.models[None]
        self.cache = zz.ZigzagCache(self.model.config, self.plan, max_len=max_len, rollback=rollback)
        self.rows, self.peak, self.undone = Rows(), 0, False
        # Codes of the same vectors, computed in another order of additions, may differ by one.
        self.tolerance = {"int4": 0.8}.get(formats.get("kv_format"), 0.2) if formats else 1e-4
        if formats.get("key_smoothing"):
            self.tolerance = 0.4

    def teardown(self):
        if hasattr(self, "patch"):
            self.patch.undo()

    # ---- what every step goes through ----

    def act(self, call, after: Rows, fault, refusals: dict[str, bool] | None = None, reach: int = 0):
        """call(cache) makes `after` of the rows; or raises one of `refusals` (words: whether they would be true).

        reach: columns that it may write before it fails.
        """
        counts["steps"] += 1
        before = self.rows
        self.peak = max(self.peak, reach)
        try:
            with injected(self.model, fault), torch.no_grad():
                if fault and fault[0] == "interrupt":
                    stopped = self.interrupt(call, fault)
                else:
                    call(self.cache)
                    stopped = False
        except (Injected, RuntimeError, ValueError, IndexError) as error:
            stopped = self.is_fault(error) or not self.is_refusal(error, refusals or {})
            after = before if not stopped else after
        if stopped:
            self.settle([before, after])
        else:
            self.rows = after
        self.undone |= self.rows is before or self.rows.columns < before.columns
        if not self.rows.columns:
            self.peak, self.undone = 0, False

    def is_fault(self, error) -> bool:
        while error is not None and not isinstance(error, Injected):
            error = error.__cause__ or error.__context__
        return error is not None

    def is_refusal(self, error, refusals) -> bool:
        words = [words for words in refusals if words in str(error)]
        if not words or not refusals[words[0]]:
            raise error
        counts["refusals"] += 1
        return True

    def interrupt(self, call, fault) -> bool:
        _, where, opcodes = fault
        trial = copy.deepcopy(self.cache)
        try:
            counted = Places(opcodes=opcodes)
            counted.run(lambda: call(trial))
        except (RuntimeError, ValueError, IndexError):
            call(self.cache)  # refused; the same without a trace
            raise AssertionError("a copy refuses what the cache does") from None
        counts["interrupts"] += 1
        return Places(1 + int(where * (counted.count - 1)), opcodes).run(lambda: call(self.cache))

    def settle(self, candidates):
        """After a fault: the cache is what it was before or would have been after, or it demands `reset()`."""
        counts["faults"] += 1
        seen = copy.deepcopy(self.cache)
        try:
            seen.reserve(0)  # closes a forward that an interrupt has left open; in the cache itself the next use does
        except RuntimeError as error:
            assert "call reset()" in str(error)
            counts["marked"] += 1
            for use in (
                lambda: self.cache.crop(-1),
                lambda: self.cache.reserve(1),
                lambda: self.cache.reorder_cache(torch.tensor([0])),
                lambda: self.model(torch.tensor([[5]]), past_key_values=self.cache),
            ):
                with pytest.raises(RuntimeError, match=r"call reset\(\)"):
                    use()
            self.cache.reset()
            self.rows = Rows()
            return
        columns = seen.get_seq_length()
        for rows in candidates:
            if rows.columns == columns and (not columns or rows.batch == self.cache.state.batch) and self.holds(rows):
                self.rows = rows
                return
        raise AssertionError(f"the cache is neither {candidates[0]} nor {candidates[1]}, it has {columns} columns")

    def holds(self, rows: Rows) -> bool:
        """The ids that the cache compares conversations by, and the next logits."""
        state = self.cache.state
        noted = () if not rows.columns else tuple(map(tuple, state.tokens.ids[:, : rows.columns].tolist()))
        return noted == rows.rows and self.difference(rows) < self.tolerance

    def difference(self, rows: Rows) -> float:
        """Between the next logits of a copy of the cache and those of a fresh cache of the same tokens."""
        new = new_rows(rows.batch or 2, 1, seed=9)
        found, expected = copy.deepcopy(self.cache), zz.ZigzagCache(self.model.config, self.plan)
        with torch.no_grad():
            if rows.columns and any(rows.tokens):
                packed = rows.left_padded()
                self.fresh_model(**arguments(Rows(), packed, False), past_key_values=expected)
            else:
                packed = Rows()
            if self.max_len is None or not self.grows or rows.columns < self.max_len:
                logits = self.model(**arguments(rows, new, False), past_key_values=found).logits
                wanted = self.fresh_model(**arguments(packed, new, False), past_key_values=expected).logits
                return (logits - wanted).abs().max().item()
        return 0.0

    @invariant()
    def holds_what_it_should(self):
        if not hasattr(self, "rows"):
            return
        if self.cache.state.forward is None:
            assert self.cache.get_seq_length() == self.rows.columns
        if self.rows.columns and self.cache.state.forward is None:
            assert self.cache.seq_lens.tolist() == [len(row) for row in self.rows.tokens]
            assert self.cache.state.tokens.columns == self.rows.columns
        assert self.holds(self.rows)

    # ---- uses ----

    def has_room(self):
        return self.rows.columns < MOST_COLUMNS

    def room_for(self, q_len: int) -> dict[str, bool]:
        limit = self.max_len is not None and self.grows and self.rows.columns + q_len > self.max_len
        return {"the cache is full: max_len": limit}

    def forward(self, new: Rows, plain: bool, keep: int, fault):
        held, after = self.rows, self.rows.added(new)
        given = arguments(held, new, plain and not any(SKIP in row for row in after.rows))
        skips = any(SKIP in row for row in new.rows)
        refusals = self.room_for(new.columns)
        # Rings may hold what was undone until every row has as many tokens as had been written.
        shortest = min(map(len, held.tokens), default=0)
        ahead = self.peak > held.columns or (self.undone and self.peak > shortest)
        refusals["leaves new tokens out right after crop()"] = skips and ahead
        call = lambda cache: self.model(**given, past_key_values=cache, logits_to_keep=keep)  # noqa: E731
        self.act(call, after, fault, refusals, reach=after.columns)

    @precondition(has_room)
    @rule(
        q_len=st.integers(1, 45), batch=st.integers(1, 3), seed=SEEDS, plain=st.booleans(), keep=st.integers(0, 1), fault=FAULTS
    )
    def prompt(self, q_len, batch, seed, plain, keep, fault):
        self.forward(new_rows(self.rows.batch or batch, q_len, seed), plain, keep, fault)

    @precondition(has_room)
    @rule(q_len=st.integers(1, 30), skipped=st.lists(st.integers(0, 30), min_size=4, max_size=4), seed=SEEDS, fault=FAULTS)
    def padded_prompt(self, q_len, skipped, seed, fault):
        skipped = skipped if q_len > 1 or self.rows.columns else [0] * 4
        self.forward(new_rows(self.rows.batch or 3, q_len, seed, skipped), False, 1, fault)

    @precondition(has_room)
    @rule(skipped=st.lists(st.booleans(), min_size=4, max_size=4), seed=SEEDS, plain=st.booleans(), fault=FAULTS)
    def step(self, skipped, seed, plain, fault):
        left_out = [int(each and self.rows.columns > 0) for each in skipped]
        self.forward(new_rows(self.rows.batch or 2, 1, seed, left_out), plain, 0, fault)

    @precondition(lambda self: self.rows.columns)
    @rule(count=st.integers(0, 25), negative=st.booleans(), fault=FAULTS)
    def crop(self, count, negative, fault):
        columns, removed = self.rows.columns, min(count, self.rows.columns) if not negative else count
        left = columns - removed
        argument = -count if negative else left
        if not argument:
            removed, left = 0, columns
        after = self.rows.cut(left) if left > 0 else Rows()
        lost = self.streams and self.peak - left > self.rollback and self.peak > self.slots
        refusals = {"take back": lost, "takes back more than": removed > columns}
        self.act(lambda cache: cache.crop(argument), after, fault, refusals)

    @precondition(lambda self: self.rows.columns)
    @rule(drawn=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 25)), min_size=4, max_size=4), fault=FAULTS)
    def crop_rows(self, drawn, fault):
        """Each row takes back a number of its own."""
        ends, removed = self.rows.ends, drawn[: self.rows.batch]
        left = [end - n for end, n in zip(ends, removed, strict=True)]
        lost = self.streams and self.peak > self.slots and any(n > 0 and self.peak - n > self.rollback for n in left)
        refusals = {"take back": lost, "takes back more than": any(n < 0 for n in left)}
        self.act(lambda cache: cache.crop([-n for n in removed]), self.rows.cut_rows(left), fault, refusals)
        if self.rows.columns:  # what a row wrote ahead stays as far ahead where it leaves columns out, which then count twice
            self.peak, self.undone = self.peak + max(removed), True

    def rows_change(self, call, index, fault):
        self.act(call, self.rows.chosen(index), fault)

    @precondition(lambda self: self.rows.columns)
    @rule(drawn=st.lists(st.integers(0, 11), min_size=4, max_size=4), fault=FAULTS)
    def reorder(self, drawn, fault):
        index = [i % self.rows.batch for i in drawn[: self.rows.batch]]
        self.rows_change(lambda cache: cache.reorder_cache(torch.tensor(index)), index, fault)

    @precondition(lambda self: self.rows.columns)
    @rule(drawn=st.lists(st.integers(0, 11), min_size=1, max_size=MOST_ROWS), as_mask=st.booleans(), fault=FAULTS)
    def select(self, drawn, as_mask, fault):
        index = [i % self.rows.batch for i in drawn]
        if as_mask:
            chosen = torch.zeros(self.rows.batch, dtype=torch.bool)
            chosen[index] = True
            index = chosen.nonzero().flatten().tolist()
        else:
            chosen = torch.tensor(index)
        self.rows_change(lambda cache: cache.batch_select_indices(chosen), index, fault)

    @precondition(lambda self: self.rows.columns and self.rows.batch * 2 <= MOST_ROWS)
    @rule(fault=FAULTS)
    def repeat(self, fault):
        index = [i for i in range(self.rows.batch) for _ in range(2)]
        self.rows_change(lambda cache: cache.batch_repeat_interleave(2), index, fault)

    @rule(fault=FAULTS)
    def reset(self, fault):
        self.act(lambda cache: cache.reset(), Rows(), fault)

    @rule(tokens=st.integers(0, 300), fault=FAULTS)
    def reserve(self, tokens, fault):
        self.act(lambda cache: cache.reserve(tokens), self.rows, fault, self.room_for(tokens))

    @precondition(lambda self: self.rows.columns and not any(SKIP in row for row in self.rows.rows))
    @rule(same=st.integers(0, 200), more=st.integers(1, 10), fault=FAULTS)
    def another_conversation(self, same, more, fault):
        """What generate() asks of a cache that holds something; nothing but the common prefix stays."""
        held = self.rows
        same = min(same, held.columns)
        ids = torch.cat([held.ids[:, :same], torch.full((held.batch, more), 199)], 1)
        left = min(same, ids.shape[1] - 1)
        lost = self.streams and left and self.peak - left > self.rollback and self.peak > self.slots
        refusals = {"and its rings cannot take back": lost}
        self.act(lambda cache: cache.keep_first(ids), held.cut(left), fault, refusals)

    @rule(swap=st.booleans())
    def deepcopy(self, swap):
        """Either of the two goes on; the other one is used and then thrown away."""
        counts["steps"] += 1
        other = copy.deepcopy(self.cache)
        if swap:
            self.cache, other = other, self.cache
        if self.rows.columns:
            other.reorder_cache(torch.zeros(self.rows.batch, dtype=torch.long))
        other.reset()

    @precondition(lambda self: self.rows.columns)
    @rule()
    def save_and_load(self):
        """What was read goes on, in the place of what was written."""
        counts["steps"] += 1
        with tempfile.TemporaryDirectory() as folder:
            self.cache.save(f"{folder}/cache")
            self.cache = zz.ZigzagCache.load(f"{folder}/cache", self.model)

    @precondition(lambda self: self.rows.columns and self.rows.columns < MOST_COLUMNS and self.max_len is None)
    @rule(seed=SEEDS, more=st.integers(1, 12), fault=FAULTS)
    def generate(self, seed, more, fault):
        """A turn of a conversation: the whole of it, new tokens, three more by the model."""
        if any(SKIP in row for row in self.rows.rows) or (fault and fault[0] == "interrupt"):
            return
        ids = torch.cat([self.rows.ids, new_rows(self.rows.batch, more, seed).ids], 1)
        plan = {"past_key_values": zz.ZigzagCache(self.model.config, self.plan)}
        expected = generate(self.fresh_model, 3, ids, **plan)
        found = []
        call = lambda cache: found.append(generate(self.model, 3, ids, past_key_values=cache))  # noqa: E731
        before, columns = self.rows, ids.shape[1]
        whole = torch.cat([ids, expected], 1).tolist()
        steps = [Rows(tuple(tuple(row[: columns + n]) for row in whole)) for n in range(3)]
        self.generated(call, before, steps, fault)
        if found and self.tolerance == 1e-4:
            assert found[0].equal(expected)

    def generated(self, call, before, steps, fault):
        """A fault leaves the cache after any of the steps."""
        settle = self.settle
        self.settle = lambda candidates: settle([before, *steps])
        try:
            self.act(call, steps[-1], fault, reach=steps[-1].columns)
        finally:
            del self.settle


@pytest.fixture(scope="module")
def models():
    with contextlib.ExitStack() as stack:
        for chunk in (None, 7, 20):
            model = new_model("llama", hidden_size=64, intermediate_size=64, num_hidden_layers=3)
            plan = zz.Plan(KINDS[0], sink=4, window=16)
            CacheMachine.models[chunk] = stack.enter_context(zz.zigzag(model, plan, prefill_chunk=chunk))
        yield
        CacheMachine.models.clear()


def test_any_sequence_of_uses_and_failures(models, record_property):
    seconds = 0.9 * float(os.environ.get("FUZZ_SECONDS") or 0)
    end = time.monotonic() + seconds
    options = settings(
        max_examples=25 if seconds else 20,
        stateful_step_count=40 if seconds else 20,
        derandomize=not seconds,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,) if seconds else (Phase.generate, Phase.shrink),  # shrinking may take five minutes
        report_multiple_bugs=False,
        print_blob=True,
    )
    counts.clear()
    try:
        run_state_machine_as_test(CacheMachine, settings=options)
        while time.monotonic() < end:
            run_state_machine_as_test(CacheMachine, settings=options)
    finally:
        for name, count in counts.items():
            record_property(f"count of {name} of caches", count)
    assert counts["faults"] > 10 and counts["interrupts"] > 3
