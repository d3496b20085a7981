"""One count of KV bytes: what `solve` plans with, cost lists, the scheduler, the command and a filled cache report."""

import re

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from transformers import LlamaConfig  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import zigzag_ext as zz  # noqa: E402
from zigzag_ext import _C  # noqa: E402
from zigzag_ext.cli.main import app  # noqa: E402
from zigzag_ext.planning.costs import kv_costs  # noqa: E402
from zigzag_ext.planning.kv_format import FORMATS  # noqa: E402

FORMAT = st.tuples(st.sampled_from(FORMATS), st.sampled_from(FORMATS)).map("/".join)


def filled(plan, kv_heads, head_dim, context, batch):
    """A cache of `plan` in float32 that holds `context` tokens in each row."""
    heads = {"num_attention_heads": kv_heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    config = LlamaConfig(num_hidden_layers=plan.num_layers, hidden_size=kv_heads * head_dim, **heads)
    cache = zz.ZigzagCache(config, plan, max_len=64)
    with cache.forward(batch, context):
        for layer in cache.layers:
            layer.attend(*torch.randn(3, batch, kv_heads, context, head_dim).unbind(), None)
    return cache


@settings(max_examples=20)
@given(
    data=st.data(),
    shape=st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 4])),
    level=st.sampled_from(["layer", "head"]),
    formats=st.tuples(FORMAT, FORMAT),
    sizes=st.tuples(st.integers(0, 5), st.integers(1, 9), st.integers(1, 40)),
    head_dim=st.sampled_from([64, 80, 128]),
    batch=st.integers(1, 3),
)
def test_all_agree_to_the_byte(data, shape, level, formats, sizes, head_dim, batch, tmp_path_factory):
    layers, kv_heads = shape
    (sink, window, context), (kv_format, ring_kv_format) = sizes, formats
    scores = np.array(data.draw(st.lists(st.integers(0, 8), min_size=layers * kv_heads, max_size=layers * kv_heads)))
    scores = scores.reshape(shape) / 8
    given_formats = {"kv_format": kv_format, "ring_kv_format": ring_kv_format}
    plan = zz.solve(
        scores, 0.5, level=level, context=context, head_dim=head_dim, element_bytes=4, sink=sink, window=window, **given_formats
    )
    planned = plan.provenance["kv_bytes"]

    scheduler = _C.Scheduler(
        plan.kinds, sink, window, kv_heads, kv_heads, head_dim, "float32", plan.kv_format, plan.ring_kv_format
    )
    assert scheduler.kv_bytes(1, context) == planned

    rings = {"sink": sink, "window": window, "kv_format": plan.kv_format, "ring_kv_format": plan.ring_kv_format}
    retrieval, streaming = kv_costs(layers, kv_heads, head_dim, 4, context, **rings)
    retrieves = np.array(plan.retrieval_heads(kv_heads)).sum(1)
    per_layer = [
        r * n // kv_heads + s * (kv_heads - n) // kv_heads for r, s, n in zip(retrieval, streaming, retrieves, strict=True)
    ]
    assert sum(per_layer) == planned

    cache = filled(plan, kv_heads, head_dim, context, batch)
    assert cache.kv_bytes() == batch * planned == scheduler.kv_bytes(batch, context) <= cache.memory_bytes()
    assert f"{batch * planned:,} bytes" in cache.memory_report().splitlines()[-1]

    table, folder = "\n".join("\t".join(map(str, row)) for row in scores), tmp_path_factory.mktemp("scores")
    (folder / "scores.tsv").write_text(table)
    options = {"retrieval-ratio": 0.5, "level": level, "context": context, "head-dim": head_dim, "sink": sink, "window": window}
    options |= {"kv-format": kv_format, "ring-kv-format": ring_kv_format, "output": folder / "plan.json"}
    arguments = ["solve", str(folder / "scores.tsv"), *(f"--{name}={value}" for name, value in options.items())]
    printed = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"}).output
    in_16_bits = _C.Scheduler(
        plan.kinds, sink, window, kv_heads, kv_heads, head_dim, "float16", plan.kv_format, plan.ring_kv_format
    )
    assert re.search(r"\(([\d,]+) bytes\)", printed)[1].replace(",", "") == str(in_16_bits.kv_bytes(1, context))


def test_formats_move_the_budget():
    scores = np.arange(8)[:, None] / 8
    whole, quarter = (
        zz.solve(scores, kv_bytes=1e6, context=4096, head_dim=64, sink=4, window=60, kv_format=f) for f in (None, "int4")
    )
    assert len(quarter.retrieval_layers) > len(whole.retrieval_layers)
    assert str(quarter.kv_format) == "int4" and quarter.provenance["kv_bytes"] <= 1e6
    slack = zz.solve(scores, 0.5, context=4096, head_dim=64, sink=4, window=60, rollback=20).provenance
    none = zz.solve(scores, 0.5, context=4096, head_dim=64, sink=4, window=60).provenance
    assert slack["kv_bytes"] - none["kv_bytes"] == 4 * 20 * 2 * 64 * 2 and slack["rollback"] == 20
    with pytest.raises(ValueError, match="rollback"):
        zz.solve(scores, 0.5, rollback=-1)
