"""enable(compile=True): the tokens of the eager path from one graph that serves every length, prompt and cache."""

import contextlib
import copy
import gc

import pytest
import torch
from dense_oracle import dense_oracle, next_logits
from interrupts import Places
from tiny_models import NUM_LAYERS, generate, new_model, padded_prompt, prompt
from torch._dynamo.utils import counters

import zigzag_ext as zz
from zigzag_ext.hf.compiled import _LentStream
from zigzag_ext.planning import waiting

SINK, WINDOW = 4, 16
MIXED = ["streaming", "retrieval", "streaming", "streaming"]
PLAN = zz.Plan(MIXED, sink=SINK, window=WINDOW)
SAMPLING, SEED = {"do_sample": True, "temperature": 0.8, "top_k": 20}, 5
SHORT = MIXED[:2]  # a compilation takes longer with every layer: one of each kind for each family
GREEDY = 300  # tokens chosen greedily before sampling starts


def never_again():
    """Compiling anything raises."""
    return torch.compiler.set_stance("fail_on_recompile")


@pytest.fixture(scope="module")
def eager():
    """A model of its own with the same weights, so that the compiled one stays as it is."""
    model = new_model("llama")
    with zz.zigzag(model, PLAN):
        yield model


@pytest.fixture(scope="module")
def compiled():
    """Compiled for one row and for several."""
    model = new_model("llama")
    with zz.zigzag(model, PLAN, max_len=256, compile=True):
        counters.clear()  # of tests before
        told = []
        waiting.show_by(lambda text: (told.append(text), contextlib.nullcontext())[1])
        for batch in ({"input_ids": prompt(20)}, padded_prompt([20, 9, 3]), padded_prompt([12, 20])):
            generate(model, 2, **batch)
        waiting.show_by(None)
        assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
        assert told[0].startswith("compiling the decode step, once")
        yield model


def best_only(scores: torch.Tensor) -> torch.Tensor:
    return torch.full_like(scores, -torch.inf).scatter(-1, scores.argmax(-1, keepdim=True), 0.0)


def greedy_first(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A logits processor: greedy search for GREEDY tokens behind a prompt of 40 columns, sampling after that."""
    return best_only(scores) if input_ids.shape[1] < 40 + GREEDY else scores


def chosen(logits: torch.Tensor) -> torch.Tensor:
    """The tokens that generate() picks, one column after the other, from logits [batch, new tokens, vocab]."""
    torch.manual_seed(SEED)
    logits = torch.cat([best_only(logits[:, :GREEDY]), logits[:, GREEDY:]], 1) / SAMPLING["temperature"]
    logits = logits.masked_fill(logits < logits.topk(SAMPLING["top_k"]).values[..., -1:], -torch.inf)
    return torch.cat([column.softmax(-1).multinomial(1) for column in logits.unbind(1)], 1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt_neox", "phi3"])
def test_tokens_over_many_windows_equal_eager_and_reference(family):
    """One row and a left-padded batch, first greedy, then sampled. The reference sees the answer and must choose the same."""
    model = new_model(family, num_hidden_layers=len(SHORT))
    batches = [padded_prompt(rows, seed=4) for rows in ([40], [40, 23, 3])]  # of seeds 1 to 4 the one without the closest ties
    plan, answers = zz.Plan(SHORT, sink=SINK, window=WINDOW), {}
    for name, way in {"eager": zz.zigzag(model, plan), "compiled": zz.zigzag(model, plan, max_len=640, compile=True)}.items():
        with way:
            for index, batch in enumerate(batches):
                torch.manual_seed(SEED)
                answers[name, index] = generate(model, 600, **batch, **SAMPLING, logits_processor=[greedy_first])
    with dense_oracle(model, SHORT, SINK, WINDOW):
        for index, batch in enumerate(batches):
            answer = answers["eager", index]
            assert answer.equal(chosen(next_logits(model, answer, **batch)))
            assert answers["compiled", index].equal(answer)


def test_a_step_right_after_the_batch_has_changed(compiled, eager):
    """Rows are repeated, then one of them is chosen, without an eager forward between."""

    def logits(model):
        cache = zz.ZigzagCache(model.config, PLAN, max_len=256)
        step = lambda ids, held: model(ids, past_key_values=cache, attention_mask=torch.ones(len(ids), held)).logits  # noqa: E731
        with torch.no_grad():
            step(prompt(30), 30)
            cache.batch_repeat_interleave(2)
            repeated = step(torch.tensor([[3], [4]]), 31)
            cache.batch_select_indices(torch.tensor([1]))
            return repeated, step(torch.tensor([[5]]), 32)

    for found, expected in zip(logits(compiled), logits(eager), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_compiled_again(compiled, eager):
    """A longer context, another prompt, another cache object, another capacity, a cache after reset(), a cache that grows."""
    cache = zz.ZigzagCache(compiled.config, PLAN, max_len=111)
    growing = zz.ZigzagCache(compiled.config, PLAN)
    with never_again():
        for seed in (1, 2):
            assert generate(compiled, 200, prompt(30, seed=seed)).equal(generate(eager, 200, prompt(30, seed=seed)))
            answer = generate(compiled, 50, prompt(7, seed=seed), past_key_values=cache)
            assert answer.equal(generate(eager, 50, prompt(7, seed=seed)))
            cache.reset()
        answer = generate(compiled, 560, prompt(7), past_key_values=growing)
        assert growing.layers[1].keys.shape[2] > 512 and answer.equal(generate(eager, 560, prompt(7)))
        batch = padded_prompt([9, 30, 12, 4])  # a batch size not seen before
        assert generate(compiled, 40, **batch).equal(generate(eager, 40, **batch))


def test_a_step_attends_once_per_layer_and_copies_no_cache(compiled):
    cache = zz.ZigzagCache(compiled.config, PLAN, max_len=4096)
    with never_again(), torch.no_grad():
        ids = torch.cat([prompt(9), generate(compiled, 4, prompt(9), past_key_values=cache)], 1)
        with torch.profiler.profile(profile_memory=True) as profile:
            generate(compiled, 3, ids, past_key_values=cache)
    events = profile.events()
    assert sum(event.name == "zigzag::attention_" for event in events) == 3 * NUM_LAYERS
    largest = max(event.self_cpu_memory_usage for event in events)
    assert 0 < largest < cache.layers[1].keys.nbytes / 10, "something as large as a cache was allocated"


def test_two_live_caches_alternate(compiled, eager):
    prompts = [prompt(25, seed=3), prompt(40, seed=4)]
    steps = prompt(30, 2, seed=5)

    def logits(model):
        caches, found = [zz.ZigzagCache(model.config, PLAN, max_len=100) for _ in prompts], []
        for ids, cache in zip(prompts, caches, strict=True):
            model(ids, past_key_values=cache)
        for column in range(steps.shape[1]):
            for row, cache in enumerate(caches):
                found.append(model(steps[row : row + 1, column : column + 1], past_key_values=cache).logits)
        return torch.stack(found)

    with torch.no_grad():
        torch.testing.assert_close(logits(compiled), logits(eager), atol=2e-4, rtol=1e-4)


def test_the_memory_of_a_finished_prompt_is_used_again_but_never_that_of_a_live_one(compiled):
    options = {"return_dict_in_generate": True}
    with never_again():
        held = compiled.generate(prompt(30), max_new_tokens=4, do_sample=False, **options).past_key_values
        before, address = copy.deepcopy(held), held.layers[1].stores[0].buffers["keys"].data_ptr()
        other = compiled.generate(prompt(30, seed=8), max_new_tokens=40, do_sample=False, **options).past_key_values
    assert held.seq_lens.tolist() == [33] and other.seq_lens.tolist() == [69]
    assert held.layers[1].keys[:, :, :33].equal(before.layers[1].keys[:, :, :33])
    assert other.layers[1].stores[0].buffers["keys"].data_ptr() != address
    del held
    again = compiled.generate(prompt(30), max_new_tokens=4, do_sample=False, **options).past_key_values
    assert again.layers[1].stores[0].buffers["keys"].data_ptr() == address and again.seq_lens.tolist() == [33]


def test_beams(compiled, eager):
    batch = padded_prompt([30, 11])
    with never_again():
        answer = generate(compiled, 60, **batch, num_beams=2)
    assert answer.equal(generate(eager, 60, **batch, num_beams=2))


def test_several_turns_and_inference_mode(compiled, eager):
    cache, ids = zz.ZigzagCache(compiled.config, PLAN, max_len=200), prompt(12)
    for turn, mode in enumerate((torch.inference_mode, contextlib.nullcontext, torch.inference_mode)):
        with mode(), never_again():
            answer = generate(compiled, 25, ids, past_key_values=cache)
        assert answer.equal(generate(eager, 25, ids)), f"turn {turn}"
        ids = torch.cat([ids, answer, prompt(6, seed=turn)], 1)


def test_a_step_past_max_len_raises_and_writes_nothing(compiled):
    cache = zz.ZigzagCache(compiled.config, PLAN, max_len=12)
    with torch.no_grad():
        compiled(prompt(11), past_key_values=cache)
        compiled(prompt(1), past_key_values=cache)
        before = copy.deepcopy(cache)
        with pytest.raises(RuntimeError, match="max_len is 12 tokens, this forward needs 13"):
            compiled(prompt(1), past_key_values=cache)
    for layer, old in zip(cache.layers, before.layers, strict=True):
        torch.testing.assert_close(layer.keys, old.keys, equal_nan=True, rtol=0, atol=0)
    assert cache.seq_lens.tolist() == [12]


def test_the_outputs_of_a_step_are_those_of_the_model(compiled, eager):
    def step(model, **options):
        cache = zz.ZigzagCache(model.config, PLAN, max_len=40)
        with torch.no_grad():
            model(prompt(20), past_key_values=cache)
            first = model(prompt(1, seed=2), past_key_values=cache, **options)
            model(prompt(1, seed=3), past_key_values=cache, **options)  # must not overwrite the first
        return first, cache

    (actual, cache), (expected, _) = step(compiled), step(eager)
    assert type(actual) is type(expected) and actual.keys() == expected.keys() and actual.past_key_values is cache
    torch.testing.assert_close(actual.logits, expected.logits, atol=2e-4, rtol=1e-4)
    with pytest.raises(RuntimeError, match="LlamaForCausalLM cannot decode as one compiled graph"):
        step(compiled, output_hidden_states=True)


def test_gradients_and_uncomparable_arguments(compiled):
    cache = zz.ZigzagCache(compiled.config, PLAN, max_len=40)
    with torch.no_grad():
        compiled(prompt(5), past_key_values=cache)
        with pytest.raises(TypeError, match="takes tensors and plain values, token_type_ids is a list"):
            compiled(prompt(1), past_key_values=cache, token_type_ids=[1])
    with pytest.warns(UserWarning, match="no gradients are recorded"):
        assert not compiled(prompt(1), past_key_values=cache).logits.requires_grad


def test_what_cannot_be_one_graph_is_refused_by_name():
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="llama: compile=True does not serve 'dynamic' RoPE .model.rotary_emb."):
        zz.enable(new_model("llama", rope_parameters=scaled), PLAN, compile=True)
    split = new_model("llama")
    split.lm_head.to("meta")
    with pytest.raises(ValueError, match="llama: compile=True needs the whole model on one device, it is on cpu, meta"):
        zz.enable(split, PLAN, compile=True)
    with pytest.raises(TypeError, match="compile must be True or False, got 'max-autotune'"):
        zz.enable(new_model("llama"), PLAN, compile="max-autotune")


def test_a_model_that_needs_the_host_in_a_step_says_so():
    model = new_model("llama")
    stock = model.model.norm.forward
    model.model.norm.forward = lambda hidden: stock(hidden) if hidden.sum() > 0 else -stock(-hidden)
    with zz.zigzag(model, PLAN, compile=True), torch.no_grad():
        cache = zz.ZigzagCache(model.config, PLAN)
        model(prompt(5), past_key_values=cache)
        with pytest.raises(RuntimeError, match="LlamaForCausalLM cannot decode as one compiled graph"):
            model(prompt(1), past_key_values=cache)
        assert cache.get_seq_length() == 5


def test_disable_restores_the_forward():
    model = new_model("llama")
    zz.enable(model, PLAN, compile=True)
    assert {"forward", "generate"} <= vars(model).keys()
    zz.disable(model)
    assert not {"forward", "generate"} & vars(model).keys()
    wrapped = model.forward = lambda *args, **kwargs: type(model).forward(model, *args, **kwargs)
    with zz.zigzag(model, PLAN, compile=True):
        assert model.forward is not wrapped
    assert model.forward is wrapped


@pytest.mark.slow
def test_an_interrupt_within_a_compiled_step(request):
    """The ring has no slot to spare: a token that was written and taken back has overwritten one that would show again."""
    plan = zz.Plan(["streaming", "retrieval"], sink=4, window=16)
    model = new_model("llama", num_hidden_layers=2)
    zz.enable(model, plan, compile=True)
    cache = zz.ZigzagCache(model.config, plan)
    step, following = (lambda seed=seed: model(prompt(1, seed=seed), past_key_values=cache).logits for seed in (2, 9))

    def fill():
        cache.reset()
        model(prompt(30), past_key_values=cache)

    with torch.no_grad():
        fill()
        step()
        done = following()
        fill()
        before = following()
        fill()
        counted = Places(own=True)
        assert not counted.run(step)
        marked = 0
        for at in range(1, counted.count + 1, 1 if request.config.getoption("--long") else 3):
            fill()
            assert Places(at, own=True).run(step)
            try:
                found = following()
            except RuntimeError as error:
                assert "overwritten older ones" in str(error) or "while the lengths advanced" in str(error)
                marked += 1
                continue
            assert any(torch.allclose(found, logits, atol=1e-5, rtol=1e-5) for logits in (before, done)), at
        assert marked >= 3


def test_captures_take_the_streams_of_caches_that_are_gone(monkeypatch):
    """Libraries keep memory for each stream that they have seen."""
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(object()) or made[-1])
    monkeypatch.setattr(_LentStream, "spare", {})
    device = torch.device("cuda", 0)
    first, second = _LentStream(device), _LentStream(device)
    assert [first.stream, second.stream] == made
    del first
    gc.collect()
    third, fourth = _LentStream(device), _LentStream(device)
    assert [third.stream, second.stream, fourth.stream] == made
