"""Every op refuses a wrong tensor in every place by its name, before anything is written."""

import itertools

import pytest
import torch

from zigzag_ext.attention import ops

BATCH, HEADS, ROWS, SLOTS, DIM, Q_LEN = 2, 2, 3, 12, 64, 2
WRITTEN = {"k_cache", "v_cache", "k_scale", "v_scale", "out", "lse", "workspace"}


def ones(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


def stored(device, dtype):
    numbers = {"dtype": torch.int32, "device": device}
    return {
        "k_new": ones(BATCH, HEADS, Q_LEN, DIM, dtype=dtype, device=device),
        "v_new": ones(BATCH, HEADS, Q_LEN, DIM, dtype=dtype, device=device),
        "k_cache": ones(ROWS, HEADS, SLOTS, DIM, dtype=torch.int8, device=device),
        "v_cache": ones(ROWS, HEADS, SLOTS, DIM, dtype=torch.int8, device=device),
        "seq_lens": torch.tensor([3, 5, 7], **numbers),
        "pad": torch.tensor([0, 1], **numbers),
        "cache_rows": torch.tensor([2, 0], **numbers),
        "k_scale": ones(ROWS, HEADS, SLOTS, device=device),
        "v_scale": ones(ROWS, HEADS, SLOTS, device=device),
    }


def attended(device, dtype):
    q = ones(BATCH, 2 * HEADS, Q_LEN, DIM, dtype=dtype, device=device)
    return stored(device, dtype) | {
        "q": q,
        "cos": ones(BATCH, Q_LEN, DIM, dtype=dtype, device=device),
        "sin": ones(BATCH, Q_LEN, DIM, dtype=dtype, device=device),
        "heads": torch.tensor([1, 0], dtype=torch.int32, device=device),
        "out": torch.zeros_like(q),
        "lse": torch.zeros(BATCH, 2 * HEADS, Q_LEN, device=device),
        "workspace": ops.new_workspace(device),
    }


def states(device, dtype):
    out = {f"out_{side}": ones(BATCH, HEADS, Q_LEN, DIM, dtype=dtype, device=device) for side in "ab"}
    return out | {f"lse_{side}": ones(BATCH, HEADS, Q_LEN, device=device) for side in "ab"}


OPS = {"attention": (ops.attention, attended), "append": (ops.append, stored), "merge_states": (ops.merge_states, states)}
NAMES = {name: list(made("cpu", torch.float32)) for name, (_, made) in OPS.items()}
PLACES = [(op, name) for op, names in NAMES.items() for name in names]


def expanded(t):
    return t[:1].expand(t.shape)


def folded(t):
    """Of the same shape, with one step for all dimensions but the last."""
    return t.as_strided(t.shape, [t.shape[-1]] * (t.dim() - 1) + [1])


WRONG = {  # of one argument
    "without memory": lambda t: t.to("meta"),
    "float64": lambda t: t.double() if t.is_floating_point() else t.long(),
    "of another dtype": lambda t: t.to(torch.int16),
    "complex": lambda t: t.to(torch.complex64),
    "without a dimension": lambda t: t[0],
    "with a dimension more": lambda t: t[None],
    "longer in the first": lambda t: torch.cat([t, t]),
    "longer in the last": lambda t: torch.cat([t, t], -1),
    "empty": lambda t: t[:0],
    "with gaps": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "sparse": lambda t: t.to_sparse(),
}
GIVE_SIZES = {"q", "k_new", "k_cache", "out_a"}  # that others must have: these may be named in their place


def serves(op, name, wrong):
    """What is not wrong: scales and states of any strides, any workspace on the CPU, which needs none."""
    if name == "workspace":
        return wrong not in ("without memory", "sparse")
    return wrong == "with gaps" and (op == "merge_states" or name.endswith("_scale"))


WRONG_WRITTEN = {"expanded": expanded, "folded": folded}


def refused(device, op, change, words):
    """change(inputs) makes them wrong; everything stays as it was."""
    function, made = OPS[op]
    inputs = made(device, torch.float32 if device == "cpu" else torch.bfloat16)
    change(inputs)
    before = {name: t.clone() for name, t in inputs.items() if t.device.type == device and not t.is_sparse}
    with pytest.raises(RuntimeError, match=words):
        function(**inputs)
    for name, t in before.items():
        assert inputs[name].equal(t), f"{name} was written to"


@pytest.mark.parametrize("op", OPS)
def test_these_inputs_are_served(device, op):
    function, made = OPS[op]
    function(**made(device, torch.float32 if device == "cpu" else torch.bfloat16))


@pytest.mark.parametrize("op,name,wrong", [(*place, wrong) for place in PLACES for wrong in WRONG if not serves(*place, wrong)])
def test_a_wrong_tensor_is_refused_by_name(device, op, name, wrong):
    words = "Sparse" if wrong == "sparse" else rf"\b({'|'.join(NAMES[op]) if name in GIVE_SIZES else name})\b"
    refused(device, op, lambda inputs: inputs.update({name: WRONG[wrong](inputs[name])}), words)


@pytest.mark.parametrize("wrong", WRONG_WRITTEN)
@pytest.mark.parametrize("op,name", [place for place in PLACES if place[1] in WRITTEN - {"workspace"}])
def test_a_written_tensor_that_overlaps_itself(device, op, name, wrong):
    refused(device, op, lambda inputs: inputs.update({name: WRONG_WRITTEN[wrong](inputs[name])}), rf"\b{name}\b")


PAIRS = [
    (op, a, b)
    for op, names in NAMES.items()
    for a, b in itertools.combinations(names, 2)
    if {a, b} & WRITTEN and "workspace" not in (a, b)
]


@pytest.mark.parametrize("op,a,b", PAIRS)
def test_written_tensors_share_memory_with_nothing(device, op, a, b):
    """Both lie in one block of memory, the second one in the middle of the first."""

    def share(inputs):
        first, second = (a, b) if inputs[a].nbytes >= inputs[b].nbytes else (b, a)
        large, small = inputs[first], inputs[second]
        block = torch.zeros(2 * large.nbytes, dtype=torch.uint8, device=device)
        middle = large.nbytes // 64 * 32
        inputs[first] = block[: large.nbytes].view(large.dtype).view(large.shape).copy_(large)
        inputs[second] = block[middle : middle + small.nbytes].view(small.dtype).view(small.shape)
        if not small.is_floating_point() and small.dim() == 1:
            inputs[second].zero_()  # numbers that would be valid

    refused(device, op, share, f"({a} and {b}|{b} and {a}) share memory")


@pytest.mark.parametrize("argument,value", [("sink", -1), ("window", -1), ("sink", 1 << 31), ("window", 1 << 31)])
@pytest.mark.parametrize("op", ["attention", "append"])
def test_a_wrong_number_is_refused_by_name(device, op, argument, value):
    function, made = OPS[op]
    inputs = made(device, torch.float32 if device == "cpu" else torch.bfloat16)
    before = {name: t.clone() for name, t in inputs.items()}
    with pytest.raises(RuntimeError, match=argument):
        function(**inputs, **{argument: value})
    assert all(inputs[name].equal(t) for name, t in before.items())
