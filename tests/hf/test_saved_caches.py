"""Caches as files: a cache that was saved goes on in another one, and in another process, with the same logits to the bit."""

import dataclasses
import json
import struct

import processes
import pytest
import torch
from safetensors import safe_open
from tiny_models import generate, new_model, padded_prompt, prompt, tiny_model

import zigzag_ext as zz
from zigzag_ext.cache import saved
from zigzag_ext.planning import writing

LAYERS = ["retrieval", "streaming", "retrieval", "streaming"]
MIXED = ["retrieval", ["retrieval", "streaming"], "streaming", ["streaming", "retrieval"]]
PLANS = {
    "layers": zz.Plan(LAYERS, sink=2, window=12),
    "mixed": zz.Plan(MIXED, sink=2, window=12),
    "streaming": zz.Plan(["streaming"] * 4, sink=0, window=9),
    "int8/int4": zz.Plan(LAYERS, sink=2, window=12, kv_format={"k": "int8", "v": "int4"}, key_smoothing=True),
    "fp8": zz.Plan(MIXED, sink=2, window=12, kv_format="fp8", ring_kv_format="int8"),
    "int4": zz.Plan(LAYERS, sink=2, window=12, kv_format="int4", ring_kv_format="int4", key_smoothing=True),
}
PROMPTS = {
    "one row": lambda: {"input_ids": prompt(70), "attention_mask": torch.ones(1, 70, dtype=torch.long)},
    "shorter than rings": lambda: padded_prompt([5, 3]),
    "padded anywhere": lambda: anywhere(padded_prompt([40, 7, 66])),
}


def anywhere(inputs: dict) -> dict:
    """Padding on the right of one row and inside of another."""
    order = torch.arange(66).repeat(3, 1)
    order[0], order[1, -9:-2] = order[0].roll(-26), torch.arange(57, 64).flip(0)
    order[1] = torch.cat([order[1, 60:], order[1, :60]])
    return {name: tensor.gather(1, order) for name, tensor in inputs.items()}


def read(model, cache, inputs: dict) -> None:
    """A prompt through an enabled model into a cache."""
    mask = inputs["attention_mask"]
    model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)


def steps(model, cache, count: int = 4) -> list[torch.Tensor]:
    """The logits of steps of one token per row, which are the same whoever asks, and of a short chunk at the end."""
    batch, found = cache.state.batch, []
    for number, width in enumerate([1] * count + [5]):
        ids = prompt(width, batch, seed=100 + number)
        positions = cache.seq_lens[:, None].long() + torch.arange(width)
        found.append(model(input_ids=ids, position_ids=positions, past_key_values=cache).logits)
    return found


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "text.cache"


@pytest.mark.parametrize("text", PROMPTS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_saved_cache_goes_on_with_the_same_logits(plan, text, path):
    model = tiny_model()
    with zz.zigzag(model, PLANS[plan]):
        cache = zz.ZigzagCache(model.config, PLANS[plan], rollback=3)
        read(model, cache, PROMPTS[text]())
        steps(model, cache, 1)
        cache.crop(-2)
        cache.save(path)
        other = zz.ZigzagCache.load(path, model)
        assert dataclasses.astuple(other.state.rows)[0].tolist() == cache.state.rows.ends.tolist()
        assert other.seq_lens.equal(cache.seq_lens) and other.kv_bytes() == cache.kv_bytes()
        assert same(steps(model, other), steps(model, cache))
        rows = torch.arange(cache.state.batch).flip(0)
        for each in (cache, other):
            each.crop(-3)
            each.reorder_cache(rows)
        assert same(steps(model, other), steps(model, cache))


def test_only_what_is_held_is_written(path):
    model, plan = tiny_model(), PLANS["mixed"]
    with zz.zigzag(model, plan):
        cache = zz.ZigzagCache(model.config, plan, max_len=100_000)
        read(model, cache, padded_prompt([900, 3]))
    cache.save(path)
    token = 2 * 2 * 64 * 4  # bytes of a token in one layer of two heads: keys and values, float32
    retrieval, rings = (900 + 3) * 2 * token, (14 + 3) * 2 * token  # two layers' worth of heads of each kind
    assert retrieval + rings + 2 * 900 * 4 <= path.stat().st_size <= retrieval + rings + 2 * 900 * 4 + 4000
    with safe_open(path, "pt") as file:
        assert file.get_slice("0.0.keys").get_shape() == [903, 2, 64]


@pytest.mark.parametrize("plan", PLANS)
def test_a_single_token_is_saved(plan, path):
    """Of one head it has one scale, which is contiguous with any stride."""
    model = tiny_model()
    with zz.zigzag(model, PLANS[plan]):
        cache = zz.ZigzagCache(model.config, PLANS[plan])
        model(prompt(1), past_key_values=cache)
        cache.save(path)
        assert same(steps(model, zz.ZigzagCache.load(path, model)), steps(model, cache))


def test_rings_of_native_windows_go_on(path):
    model, text = new_model("mistral", sliding_window=24), prompt(80)
    with zz.zigzag(model, None):
        cache = zz.ZigzagCache(model.config)
        longer = torch.cat([text, generate(model, 5, text, cache=cache), prompt(3, seed=9)], 1)
        cache.save(path)
        loaded = zz.ZigzagCache.load(path, model)
        assert len(loaded.state.made_for[0].native_layers) == 4
        assert generate(model, 8, longer, cache=loaded).equal(generate(model, 8, longer, cache=cache))


def test_generate_goes_on_with_a_loaded_cache(path):
    model, plan = tiny_model(), PLANS["layers"]
    text = prompt(60, batch=2)
    with zz.zigzag(model, plan):
        cache = zz.ZigzagCache(model.config, plan)
        generate(model, 5, text, cache=cache)
        cache.save(path)
        longer = torch.cat([text, generate(model, 5, text), prompt(9, batch=2, seed=7)], 1)
        expected = generate(model, 12, longer)
        assert generate(model, 12, longer, cache=zz.ZigzagCache.load(path, model)).equal(expected)
        wrong = longer.clone()
        wrong[1, 3] += 1
        with pytest.raises(ValueError, match="another token at position 3"):
            generate(model, 1, wrong, cache=zz.ZigzagCache.load(path, model))


@pytest.mark.parametrize(
    "method", [zz.SnapKV(budget=40, observe=8, per_head=True), zz.PromptWindows(budget=0.5, observe=8, window=4)]
)
def test_compression_goes_on(method, path):
    """Before the choice was made, when the last queries of the prompt are still needed, and after it."""
    model, plan, text = tiny_model(), PLANS["mixed"], padded_prompt([200, 90])
    method = dataclasses.replace(method, per_head=False) if plan.mixed_layers and method.group > 1 else method
    with zz.zigzag(model, plan):
        before = zz.ZigzagCache(model.config, plan, compress=method)
        read(model, before, text)
        before.save(path)
        after = zz.ZigzagCache.load(path, model)
        assert not before.compressed and after.state.observed.keys() == before.state.observed.keys()
        assert same(steps(model, after), steps(model, before))
        assert after.compressed == before.compressed and before.compressed
        before.save(path)
        again = zz.ZigzagCache.load(path, model)
        assert again.compressed == before.compressed and again.state.compression == before.state.compression
        assert same(steps(model, again), steps(model, before))
        with pytest.raises(RuntimeError, match="compressed prompt"):
            again.crop(50)


def test_in_another_process(path):
    program = f"""
        import torch, sys
        import zigzag_ext as zz
        from tiny_models import new_model, prompt, generate, padded_prompt
        torch.set_num_threads(1)
        plan = zz.Plan({MIXED}, sink=2, window=12, kv_format="int8/int4")
        model = zz.enable(new_model("llama"), plan)
        text = padded_prompt([300, 150])
        cache = zz.ZigzagCache(model.config, plan, rollback=4)
    """
    save = """
        first = generate(model, 6, text["input_ids"], attention_mask=text["attention_mask"], cache=cache)
        cache.save({path!r})
    """
    load = """
        cache = zz.ZigzagCache.load({path!r}, model)
        first = cache.state.tokens.ids[:, 300:305].long()
        first = torch.cat([first, torch.zeros(2, 1, dtype=torch.long)], 1)
    """
    go_on = """
        ids = torch.cat([text["input_ids"], first[:, :5], prompt(4, 2, seed=3)], 1)
        mask = torch.cat([text["attention_mask"], torch.ones(2, 9, dtype=torch.long)], 1)
        print(generate(model, 10, ids, attention_mask=mask, cache=cache).tolist())
    """
    saved_here = processes.run(program + save.format(path=str(path)) + go_on)
    assert processes.run(program + load.format(path=str(path)) + go_on) == saved_here and saved_here.startswith("[[")


def a_file(path, **config) -> None:
    model = new_model("llama", **config)
    with zz.zigzag(model, PLANS["layers"]):
        cache = zz.ZigzagCache(model.config, PLANS["layers"])
        read(model, cache, PROMPTS["one row"]())
    cache.save(path)


@pytest.mark.parametrize("other, message", [
    ({"num_key_value_heads": 4}, "4 layers x 2 KV heads of head_dim 64 (first); the model has 4 layers x 4 KV heads"),
    ({"head_dim": 128}, "the model has 4 layers x 2 KV heads of head_dim 128 (first)"),
    ({"num_hidden_layers": 5}, "the model has 5 layers"),
    ({"_name_or_path": "me/second"}, "it holds keys of 'first', the model is 'me/second': read the prompt again"),
])  # fmt: skip
def test_another_model_is_refused_by_name(path, other, message):
    a_file(path, _name_or_path="first")
    config = new_model("llama", _name_or_path="first").config.to_dict() | {"_name_or_path": "first"} | other
    config = type(new_model("llama").config)(**{name: value for name, value in config.items() if name != "transformers_version"})
    config._name_or_path = other.get("_name_or_path", "first")
    with pytest.raises(ValueError) as error:
        zz.ZigzagCache.load(path, config)
    assert message in str(error.value) and str(path) in str(error.value)


def changed(path, change) -> None:
    """The JSON of a cache file, or the names and shapes of its tensors, changed."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    inner = json.loads(header["__metadata__"]["zigzag_cache"])
    change(inner, header)
    header["__metadata__"]["zigzag_cache"] = json.dumps(inner)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


@pytest.mark.parametrize("change, message", [
    (lambda inner, header: inner.update(version=3), "its version is 3"),
    (lambda inner, header: inner.update(version=True), "with a version"),
    (lambda inner, header: inner.update(dtype="int8"), "dtype must be one of float32"),
    (lambda inner, header: inner.update(rollback=-1), "rollback"),
    (lambda inner, header: inner.update(max_len=True), "max_len"),
    (lambda inner, header: inner.update(max_len=10), "max_len"),
    (lambda inner, header: inner["plan"].update(sink=-1), "sink"),
    (lambda inner, header: inner["plan"].update(window=13), "1.0.keys is"),
    (lambda inner, header: inner["rows"].update(held=[1 << 40]), "rows.held must be 1 numbers"),
    (lambda inner, header: inner["rows"].update(ends=[10**6], held=[10**6]), "tokens is"),
    (lambda inner, header: inner["rows"].update(held=[3]), "seq_lens"),
    (lambda inner, header: inner.update(left_out=[5, 0, 0, 0]), "left_out"),
    (lambda inner, header: inner.update(left_out=[0]), "left_out must be 1 numbers"),
    (lambda inner, header: inner.update(compression={"method": "magic"}), "compression.method"),
    (lambda inner, header: inner.update(compression={"method": "snapkv", "budget": 40, "magic": 1}), "magic"),
    (lambda inner, header: inner.update(query_scales={"0": 1.0}), "query_scales"),
    (lambda inner, header: inner.pop("rows"), "rows must be dict"),
    (lambda inner, header: header.pop("3.0.values"), "not fully covered"),
    (lambda inner, header: header["0.0.keys"].update(dtype="I32"), "0.0.keys is I32"),
])  # fmt: skip
def test_files_that_no_cache_wrote_are_refused(path, change, message):
    a_file(path)
    changed(path, change)
    with pytest.raises(ValueError, match=message) as error:
        zz.ZigzagCache.load(path, tiny_model())
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"PK\x03\x04", struct.pack("<Q", 2) + b"{}"])
def test_other_files_are_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a cache file"):
        zz.ZigzagCache.load(path, tiny_model())
    with pytest.raises(FileNotFoundError, match="there is no cache file at"):
        zz.ZigzagCache.load(path.parent / "none", tiny_model())
    with pytest.raises(IsADirectoryError):
        zz.ZigzagCache.load(path.parent, tiny_model())


def test_what_cannot_be_saved_is_refused_and_leaves_the_file(path, monkeypatch):
    model = tiny_model()
    a_file(path)
    before = path.read_bytes()
    cache = zz.ZigzagCache(model.config, PLANS["layers"])
    with pytest.raises(ValueError, match="holds no tokens"):
        cache.save(path)

    class Mine(zz.SnapKV):
        pass

    with zz.zigzag(model, PLANS["layers"]):
        read(model, cache, PROMPTS["one row"]())
        own = zz.ZigzagCache(model.config, PLANS["layers"], compress=Mine(budget=50, observe=4))
        read(model, own, PROMPTS["one row"]())
    with pytest.raises(ValueError, match="compresses by Mine"):
        own.save(path)
    monkeypatch.setattr(writing.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="is as it was: No space left"):
        cache.save(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_devices_are_those_of_the_layers():
    model = new_model("llama")
    model.model.layers[2].to("meta")
    model.model.layers[3]._hf_hook = type("Hook", (), {"execution_device": "meta"})()
    assert [device.type for device in saved._devices(model, 4)] == ["cpu", "cpu", "meta", "meta"]
    assert [device.type for device in saved._devices(model.config, 4)] == ["cpu"] * 4
