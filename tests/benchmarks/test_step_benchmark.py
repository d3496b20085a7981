"""Benchmarks of whole models over a tiny one on the CPU: steps, prompts, capacity, and the caches they fake."""

from dataclasses import replace

import pytest
import torch

from benchmarks import capacity, step
from benchmarks.cells import fake_context, models, step_prefill
from benchmarks.peers import duo_recreation
from benchmarks.report import comparisons
from benchmarks.report.records import CapacityRecord, StepRecord, read
from benchmarks.timing import clock
from zigzag_ext.attention import ops, reference
from zigzag_ext.hf.cache_argument import cache_argument

CPU = ["--device", "cpu", "--model", "tiny", "--commit", "abc"]
PER_TOKEN = 2 * 2 * 64 * 4  # bytes of K and V: 2 heads of 64, float32


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(step, "STEPS", 4)
    monkeypatch.setattr(step, "SECONDS", 0.0)


def least_bytes(retrieval: int, context: int) -> int:
    """KV of the tiny model with `retrieval` of 4 layers retrieving."""
    return PER_TOKEN * (retrieval * context + (4 - retrieval) * (models.SINK + models.WINDOW))


def test_steps_of_a_whole_model(tmp_path, capsys):
    path, contexts = tmp_path / "step.csv", (700, 1400)
    arguments = [*CPU, "--context", "700,1400", "--csv", str(path)]
    assert step.main([*arguments, "--impl", "zigzag_eager,transformers_eager,duo_recreation"]) == 0
    rows = read(path, StepRecord)
    assert len(rows) == 2 * len(contexts) * (2 * len(models.PLANS)) and {row.phase for row in rows} == {"step", "generate"}
    assert all(row.wall_ms > 0 for row in rows if row.phase == "step")
    for name, retrieval in (("retrieval_100", 4), ("exclusive_50", 2), ("exclusive_25", 1), ("heads_50", 2)):
        for context in contexts:
            found = {r.kv_bytes for r in rows if (r.plan, r.context, r.impl) == (name, context, "zigzag_eager")}
            pages = retrieval * (PER_TOKEN * step.MARGIN + 2 * 4096)
            assert len(found) == 1 and 0 <= found.pop() - least_bytes(retrieval, context) <= pages
    with pytest.raises(SystemExit):
        step.main(["--plan", "all"])
    assert "unknown all; known: retrieval_100" in capsys.readouterr().err


def test_steps_of_a_model_with_native_windows(tmp_path):
    path = tmp_path / "step.csv"
    arguments = ["--device", "cpu", "--model", "tiny-native", "--plan", "retrieval_100,exclusive_50", "--context", "500"]
    assert step.main([*arguments, "--impl", "zigzag_eager,transformers_eager,duo_recreation", "--csv", str(path)]) == 0
    rows = read(path, StepRecord)
    assert [(row.impl, row.plan) for row in rows[::2]] == [
        ("zigzag_eager", "retrieval_100"), ("zigzag_eager", "exclusive_50"), ("transformers_eager", "full"),
    ]  # fmt: skip
    full, half, stock = (row.kv_bytes for row in rows[::2])
    windows, page = 4 * 32 * PER_TOKEN, 2 * 4096
    assert 0 <= full - windows - 2 * PER_TOKEN * 500 <= 2 * (PER_TOKEN * step.MARGIN + page)
    assert 0 <= half - windows - PER_TOKEN * (500 + models.SINK + models.WINDOW) <= PER_TOKEN * step.MARGIN + page
    assert stock < full  # its caches end with the last token


def test_faked_stock_caches_continue_native_windows():
    model = models.build_model("tiny-native", "cpu")
    for fake in (fake_context.fake_dynamic, fake_context.fake_static):
        cache, ids = fake(model, 500), torch.zeros(1, 1, dtype=torch.long)
        with torch.no_grad():
            logits = model(ids, **cache_argument(model, cache), position_ids=torch.tensor([[500]])).logits
        assert logits.isfinite().all() and [int(cache.get_seq_length(i)) for i in range(6)] == [501] * 6
        assert {layer.keys.shape[2] for layer in cache.layers if layer.is_sliding} <= {31, 32}


def test_an_interrupted_run_goes_on(tmp_path, capsys):
    path = tmp_path / "step.csv"
    arguments = [*CPU, "--plan", "exclusive_50,heads_50", "--context", "40", "--impl", "zigzag_eager", "--csv", str(path)]
    assert step.main(arguments) == 0
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:4]))  # the header, both rows of the first cell, one of the second
    capsys.readouterr()
    assert step.main(arguments) == 0
    again, out = path.read_text().splitlines(keepends=True), capsys.readouterr().out
    assert len(again) == len(whole) == 5 and again[:4] == whole[:4] and out.count(" in ") == 1
    assert [row.phase for row in read(path, StepRecord)] == ["step", "generate"] * 2
    assert step.main([*arguments, "--commit", "other"]) == 0 and len(read(path, StepRecord)) == 8


@pytest.mark.parametrize("weights, least", [("int8", 1), ("int4", 0.5)])
def test_steps_with_quantised_weights(tmp_path, weights, least):
    pytest.importorskip("torchao")
    path = tmp_path / "step.csv"
    arguments = [*CPU, "--plan", "exclusive_50", "--context", "300", "--impl", "zigzag_eager", "--weights", weights]
    assert step.main([*arguments, "--csv", str(path)]) == 0
    rows = read(path, StepRecord)
    assert [(row.model, row.phase) for row in rows] == [(f"tiny-{weights}", "step"), (f"tiny-{weights}", "generate")]
    model = models.build_model("tiny", "cpu")
    layers = sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear))
    rest = rows[0].weight_bytes - least * layers  # the head in a byte, embeddings and norms; scales
    assert 256 * 128 * (1 + 2) < rest < 256 * 128 * (1 + 4) + 0.12 * layers


def test_slow_steps_are_timed_less_often():
    class Counter:
        steps = generated = 0

        def step(self):
            self.steps += 1

        def generate(self, tokens):
            self.generated += tokens
            return tokens * 0.5

    decoder = Counter()
    step.time_steps(decoder)
    assert decoder.steps == step.WARMUP + step.STEPS
    assert step.time_generate(decoder, 500.0) == 500.0 and decoder.generated == 4 + (4 + step.STEPS) + 4


def test_prompts_of_a_whole_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_prefill, "WARMUP", 20)
    path, contexts, chunks = tmp_path / "step.csv", (300, 700), []
    attend = ops.attention
    monkeypatch.setattr(ops, "attention", lambda q, *args, **options: chunks.append(q.shape[2]) or attend(q, *args, **options))
    arguments = [*CPU, "--phase", "prefill", "--context", "300,700", "--chunk", "256", "--csv", str(path)]
    assert step.main([*arguments, "--impl", "zigzag_eager,transformers_eager"]) == 0
    rows = read(path, StepRecord)
    assert [(r.plan, r.context) for r in rows] == [(p, n) for p in ("retrieval_100", "exclusive_50", "full") for n in contexts]
    for row, retrieval in zip(rows, (4, 4, 2, 2), strict=False):
        assert row.phase == "prefill" and row.wall_ms > 0
        assert 0 <= row.kv_bytes - least_bytes(retrieval, row.context) <= retrieval * (PER_TOKEN * 256 + 2 * 4096)
    runs = [256, 20, *[256, 44] * step_prefill.REPEATS, *[256, 256, 188] * step_prefill.REPEATS]
    assert chunks == [n for _ in range(2) for n in runs for _ in range(4)], "warm-up and repeats, in chunks, in each of 4 layers"
    out = capsys.readouterr().out
    assert out.count("times as fast as retrieval_100") == 4
    assert step.main([*arguments, "--impl", "zigzag_eager"]) == 0 and len(read(path, StepRecord)) == len(rows)


def test_what_prompts_need_beside_weights_and_kv():
    def row(plan, wall_ms, peak):
        origin = ("c", "g", "d", "t", "tf", "m", "prefill", 1000, plan, "zigzag_eager")
        return StepRecord(*origin, wall_ms, 0.0, 0.0, 1 << 30, peak << 30, 2 << 30)

    lines = comparisons.of_prompts([row("retrieval_100", 3000.0, 6), row("exclusive_50", 2000.0, 5)])
    assert lines[0].endswith("retrieval_100 1000: 3.00 s, 3.00 GiB above weights and KV")
    assert lines[1].endswith("2.00 s, 1.50 times as fast as retrieval_100, 2.00 GiB above weights and KV")


@pytest.mark.parametrize("kv_format", [None, "int4"])
def test_every_slot_of_a_faked_context_is_filled(monkeypatch, kv_format):
    monkeypatch.setattr(fake_context, "FILL_CHUNK", 400)
    model = models.build_model("tiny", "cpu")
    plan = replace(models.even_plan(4, 0.5), kv_format=kv_format)
    with torch.no_grad(), step.zz.zigzag(model, plan):
        cache = fake_context.fake_zigzag(model, plan, 1000)
    for layer in cache.layers:
        for name in ("keys", "values"):
            codes, scale = getattr(layer, name), layer.stores[0].buffers.get(f"{name[:-1]}_scales")
            held = (codes if scale is None else reference.decode(codes, scale[..., : layer.slots]))[:, :, :1000]
            spread = held.std(-1)
            assert held.shape[2] == min(1000, layer.slots) and spread.min() > 0.6 and spread.max() < 1.5
            assert len(held.reshape(-1, 64).unique(dim=0)) == held.shape[1] * held.shape[2], "a chunk came twice"


def test_a_faked_context_decodes_like_a_real_one():
    """The step after `fake_zigzag` attends to every faked key: it equals a step on the same keys after a real prompt."""
    model, plan = step.build_model("tiny", "cpu"), models.even_plan(4, 0.5)
    with torch.no_grad(), step.zz.zigzag(model, plan):
        cache = step.fake_zigzag(model, plan, 500)
        twin = step.zz.ZigzagCache(model.config, plan, max_len=500 + step.MARGIN)
        model(torch.zeros(1, 500, dtype=torch.long), **cache_argument(model, twin))
        for layer, other in zip(cache.layers, twin.layers, strict=True):
            held = min(layer.slots, other.slots)  # only committed slots may be touched
            caches = layer.stores[0].caches, other.stores[0].caches
            for here, there in zip(*(c[:2] for c in caches), strict=True):
                there[:, :, :held] = here[:, :, :held]
        token = torch.ones(1, 1, dtype=torch.long)
        assert model(token, **cache_argument(model, cache)).logits.equal(model(token, **cache_argument(model, twin)).logits)
        assert cache.get_seq_length() == twin.get_seq_length() == 501


@pytest.mark.parametrize("name", ["heads_50", "exclusive_50"])
def test_the_recreation_of_duo_attention_computes_the_same_step(name):
    """On the same keys: weights permuted, two calls, joined, against our caches and the model's own weights."""
    model = step.build_model("tiny", "cpu")
    plan, context, token = step.make_plan(name, model.config), 500, torch.tensor([[7]])
    weights = model.model.layers[1].self_attn.q_proj.weight.clone()
    with torch.no_grad():
        with step.zz.zigzag(model, plan):
            cache = step.fake_zigzag(model, plan, context)
        with step.duo_weights(model, plan):
            duo = step.fake_duo(model, plan, context, step.MARGIN)
            for layer, theirs, order in zip(cache.layers, duo.layers, duo_recreation.orders(plan, 2), strict=True):
                copy_to_duo(layer, theirs, order, plan, context)
            logits = [
                model(token, **cache_argument(model, duo), position_ids=torch.tensor([[context + i]])).logits for i in range(3)
            ]
        assert torch.equal(weights, model.model.layers[1].self_attn.q_proj.weight), "weights are not as before"
        with step.zz.zigzag(model, plan):
            expected = [
                model(token, **cache_argument(model, cache), position_ids=torch.tensor([[context + i]])).logits for i in range(3)
            ]
    torch.testing.assert_close(torch.cat(logits), torch.cat(expected), atol=1e-4, rtol=1e-4)


def copy_to_duo(layer, theirs, order, plan, context):
    """What our layer holds, into the buffers of the re-creation; a ring by position, without its oldest token."""
    for part in layer.stores:
        heads = part.heads or range(len(order))
        rank = sorted(range(len(heads)), key=lambda i: order.index(heads[i]))
        position = torch.arange(context) if not part.window else torch.tensor(
            [*range(plan.sink), *range(context - plan.window + 1, context)]
        )  # fmt: skip
        slot = reference.slot_of(position, part.capacity, part.sink, part.window)
        targets = theirs.streaming if part.window else theirs.full
        for target, held in zip(targets, (part.keys, part.values), strict=True):
            target[:, : len(slot)] = held[:, rank][:, :, slot].transpose(1, 2)


def test_attention_in_blocks_is_that_of_the_reference(monkeypatch):
    monkeypatch.setattr(capacity, "BLOCK", 64)
    model = models.build_model("tiny", "cpu")
    plan = replace(models.even_plan(4, 0.5), kv_format="int8/int4")
    with torch.no_grad(), step.zz.zigzag(model, plan):
        cache = fake_context.fake_zigzag(model, plan, 300, 10)
    layer, q = next(layer for layer in cache.layers if not layer.window), torch.randn(1, 4, 1, 64)
    new = torch.randn(2, 1, 2, 1, 64)
    names = ("keys", "values", "key_scales", "value_scales")
    stored = [layer.stores[0].growing[name].tensor[:, :, :310].clone() for name in names]
    scales = {"k_scale": stored[2], "v_scale": stored[3]}
    expected, _ = reference.attention(q.double(), *new, *stored[:2], cache.seq_lens, scale=0.125, **scales)
    for head in range(2):
        queries = slice(2 * head, 2 * head + 2)
        out = capacity.attend_in_blocks(q[0, queries, 0].double() * 0.125, capacity.stored_blocks(layer, head, 300, new))
        torch.testing.assert_close(out, expected[0, queries, 0], rtol=1e-12, atol=1e-12)
    assert max(capacity.head_errors(cache, [0, 1], 4)) < 1e-5
    attend = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *args, **options: attend(*args[:5], args[5] - 30, **options))
    assert min(capacity.head_errors(cache, [0, 1], 4)) > 1e-3, "thirty tokens were left out"


@pytest.mark.parametrize("weights,wrong", [("plain", float("nan")), ("int8", 0.5)])
def test_capacity(tmp_path, monkeypatch, capsys, weights, wrong):
    if weights == "int8":
        pytest.importorskip("torchao")
    monkeypatch.setattr(clock, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(clock, "CPU_SECONDS", 0.0)
    path = tmp_path / "capacity.csv"
    arguments = [*CPU, "--cell", "exclusive_50:3000,exclusive_25:1024", "--weights", weights, "--csv", str(path)]
    arguments += ["--impl", "zigzag_eager"]
    assert capacity.main(arguments) == 0
    rows = read(path, CapacityRecord)
    assert [(r.plan, r.context, r.heads_checked) for r in rows] == [
        ("exclusive_50", 3000, 4),
        ("exclusive_25", 1024, 2),
    ]  # 1024 tokens end with a page
    for row, retrieval in zip(rows, (2, 1), strict=True):
        assert row.new_tokens >= 8 and row.wall_ms > 0 and row.floor_ms > 0 and row.largest_error_pct <= 0.01
        # two heads: 32 bytes of codes and a scale for K and V each; rings are plain
        least = 2 * 2 * 36 * retrieval * row.context + PER_TOKEN * (4 - retrieval) * (models.SINK + models.WINDOW)
        assert 0 <= row.kv_bytes - least <= retrieval * (2 * 2 * 36 * capacity.MARGIN + 4 * 4096)
    capsys.readouterr()
    assert capacity.main(arguments) == 0 and read(path, CapacityRecord) == rows
    assert capsys.readouterr().out.count("already") == 2
    monkeypatch.setattr(capacity, "head_errors", lambda *args: [0.1, wrong, 0.1])
    assert (
        capacity.main([*arguments, "--commit", "wrong"]) == 1
        and f"relative error of {100 * wrong:.2g} %, allowed 0.01 %" in capsys.readouterr().err
    )


def test_int8_weights_are_the_model_with_rounded_linear_layers():
    pytest.importorskip("torchao")
    from benchmarks.cells.quantised_weights import build_quantised

    plain = models.build_model("tiny", "cpu")
    model = build_quantised(models.MODELS["tiny"], "int8", "cpu")
    with torch.no_grad():
        state = {name: p.dequantize() if hasattr(p, "dequantize") and "Int8" in type(p).__name__ else p
                 for name, p in model.named_parameters()}  # fmt: skip
        plain.load_state_dict(state, strict=True)
        ids = torch.arange(50)[None]
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    rest = sum(p.numel() for p in plain.parameters()) - linear
    assert linear + 4 * rest < capacity.weight_bytes(model) < 1.1 * linear + 4 * rest
