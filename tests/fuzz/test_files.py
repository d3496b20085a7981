"""Any bytes, given to every reader: what is refused is refused by a ValueError of one line that names the file, quickly.

Files start as good ones and are cut, spliced, overwritten and repeated, whole or inside of an archive, as a fuzzer does.
A tenth of FUZZ_SECONDS is how long it goes on, with other files each time; unset: a few files, always the same.
"""

import io
import json
import os
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from zigzag_ext.cache import ZigzagCache
from zigzag_ext.planning import arrays, exchange
from zigzag_ext.planning.costs import head_ms_costs
from zigzag_ext.planning.plan import Plan
from zigzag_ext.planning.scores import Scores, load_scores, save_scores
from zigzag_ext.study.compare.run import read_record
from zigzag_ext.study.evaluate import results
from zigzag_ext.study.identify import run

SECONDS = 0.1 * float(os.environ.get("FUZZ_SECONDS") or 0)
EXAMPLES = 60  # of a short run, per reader
LONGEST = 2.0  # seconds of the processor that a file of a few KB may take
ORIGIN = '{"method": "lazy"}'


class Method:
    """What identify's state files are checked against."""

    steps = 5

    def __init__(self):
        self.state = {"mass": torch.zeros(2, 2, dtype=torch.float64), "measured": torch.zeros(3, dtype=torch.int64)}


def in_memory(save) -> bytes:
    content = io.BytesIO()
    save(content)
    return content.getvalue()


def a_state(folder: Path) -> bytes:
    run._save(Method(), folder / "good.npz", ORIGIN, 3)
    return (folder / "good.npz").read_bytes()


def scores(path: Path) -> bytes:
    save_scores(Scores(np.eye(3), {"model": "m", "method": "lazy"}), path)
    return path.read_bytes()


def a_table(folder: Path) -> bytes:
    numbers = {name: "0.5" for name in results.COLUMNS if results._KINDS[name] is not int}
    row = dict.fromkeys(results.COLUMNS, "1") | numbers | {"kinds": "01", "plan": "p"}
    return (",".join(results.COLUMNS) + "\n" + (",".join(row.values()) + "\n") * 2).encode()


def read_duo(path: Path) -> None:
    (path.parent / "full_attention_heads.tsv").write_text("1 0\n")
    exchange.from_duo(path.parent)


PLAN = Plan(["retrieval", ["streaming", "retrieval"]], sink=4, window=8, kv_format="int8", provenance={"a": [1.5, {"b": None}]})
COSTS = {"context": [1, 3], "retrieval": [[1, 2], [3, 4]], "streaming": [1, 1], "other": 0.5, "mixed": [[1], [2]]}


def a_plan(folder: Path) -> bytes:
    PLAN.save(folder / "good.json")
    return (folder / "good.json").read_bytes()


GEOMETRY = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 128, "head_dim": 64}


def a_cache(folder: Path) -> bytes:
    cache = ZigzagCache(LlamaConfig(**GEOMETRY), PLAN, rollback=2)
    q, k, v = torch.randn(3, 2, 2, 11, 64)
    with cache.forward(2, 11, torch.ones(2, 11), torch.ones(2, 11)):
        for layer in cache.layers:
            layer.attend(q, k, v, None)
    cache.save(folder / "good.cache")
    return (folder / "good.cache").read_bytes()


# name of the file -> (a good one, its reader)
READERS = {
    "plan.json": (a_plan, lambda path: Plan.load(path).summary()),
    "costs.json": (lambda _: json.dumps(COSTS).encode(), lambda path: head_ms_costs(path, 2, 2, 2)),
    "config.json": (lambda _: b'{"sink_size": 4, "recent_size": 8}', read_duo),
    "scores.tsv": (lambda folder: b"# layers\n\n" + scores(folder / "good.tsv"), load_scores),
    "scores.csv": (lambda _: b"0.5,0.25\r\n0.125,1\r\n", load_scores),
    "scores.npy": (lambda folder: scores(folder / "good.npy"), load_scores),
    "scores.pt": (lambda _: in_memory(lambda to: torch.save(torch.rand(3, 1, 2), to)), load_scores),
    "state.npz": (a_state, lambda path: run._restore(Method(), path, ORIGIN)),
    "rows.csv": (a_table, results.read),
    "run.json": (
        lambda _: json.dumps({"of": {"model": "m"}, "scores": {"lazy": {"seed": 0}}, "costs": {}}).encode(),
        read_record,
    ),
    "text.cache": (a_cache, lambda path: ZigzagCache.load(path, LlamaConfig(**GEOMETRY))),
}
# What readers of these names once refused by a text that was too long, that did not name the file, or by another error.
FOUND = {
    "plan.json": [lambda _: json.dumps(PLAN.as_json() | {"kv_format": {"k": "int8", "9" * 5000: "int8"}}).encode()],
    "costs.json": [
        lambda _: json.dumps(COSTS | {"mixed": [[1], 2]}).encode(),
        lambda _: json.dumps(COSTS | {"x" * 5000: 1}).encode(),
    ],
    "config.json": [
        lambda _: b'{"sink_size": "' + b"9" * 5000 + b'", "recent_size": 8}',
        lambda _: b'{"sink_size": 4, "recent_size":-8}',
    ],
    "scores.npy": [lambda good: good.replace(b'm\0\0\0"', b'm\0\0\x10"', 1)],  # of UTF-32
    "scores.pt": [lambda good: edited(good, [("over", 1.0, 0.970703125, b"\0\0\0\0\x81")])],  # where its directory is
}
# What the readers look for, or what has broken such readers elsewhere.
TOKENS = [
    b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe2\x80\xa8", b"\x1b[2J", b"\n", b"\r", b'"', b"'", b",", b"\t", b"-",
    b"{", b"}", b"[", b"]", b"(", b"[" * 500, b"1e999", b"NaN", b"Infinity", b"9" * 400, b"9" * 5000, b"x" * 140_000, b"0.5",
    b'"sink": 1,', b"null", b"true", b"<f8", b"|O", b"<U9", b"(1000000, 1000000)", b"(-1, 3)", b"PK\x03\x04", b"PK\x05\x06",
    b"\x80\x02", b"cos\nsystem\n", b"R", b"Q", b"J\xff\xff\xff\x7f", b"M\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
]  # fmt: skip
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["put", "over", "cut", "repeat", "bits"]),
        st.floats(0, 1),
        st.floats(0, 1),
        st.sampled_from(TOKENS) | st.binary(max_size=8),
    ),
    min_size=1,
    max_size=5,
)


def edited(content: bytes, edits) -> bytes:
    for kind, first, second, token in edits:
        at, end = sorted((int(first * len(content)), int(second * len(content))))
        if kind == "put":
            content = content[:at] + token + content[at:]
        elif kind == "over":
            content = content[:at] + token + content[at + len(token) :]
        elif kind == "cut":
            content = content[:at] + content[end:]
        elif kind == "repeat":
            content = content[:end] + content[at:]
        elif at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << int(second * 7)]) + content[at + 1 :]
    return content[: 1 << 20]


def inside(content: bytes, member: float, edits) -> bytes:
    """A zip file one of whose members is edited, with its checksum made to fit; other content as it is."""
    try:
        members = arrays._members(content)
    except ValueError:
        return edited(content, edits)
    names = sorted(members)
    chosen = names[int(member * (len(names) - 1))]
    members[chosen] = edited(members[chosen], edits)
    return in_memory(lambda to: _zip(to, members))


def _zip(to, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(to, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_a_reader_refuses_by_one_line_or_reads(name, tmp_path):
    make, read = READERS[name]
    good, path, counts = make(tmp_path), tmp_path / name, Counter()
    path.write_bytes(good)
    read(path)

    def check(content: bytes) -> None:
        path.write_bytes(content)
        start = time.process_time()
        try:
            read(path)
            counts["read"] += 1
        except ValueError as error:
            text = str(error)
            assert str(path.parent) in text and "\n" not in text and len(text) < 3000, text[:3000]
            counts["refused"] += 1
        assert time.process_time() - start < LONGEST

    for change in FOUND.get(name, []):
        check(change(good))
    assert counts.total() == len(FOUND.get(name, []))

    options = {"database": None, "suppress_health_check": list(HealthCheck)}
    phases = (Phase.explicit, Phase.generate, Phase.shrink)
    end = time.monotonic() + SECONDS / len(READERS)
    while True:

        @settings(max_examples=1000 if SECONDS else EXAMPLES, derandomize=not SECONDS, phases=phases, **options)
        @given(whole=st.booleans(), member=st.floats(0, 1), edits=EDITS)
        def some(whole, member, edits):
            check(edited(good, edits) if whole else inside(good, member, edits))

        some()
        if time.monotonic() >= end:
            break
    print(f"{name}: {counts['read']} files read, {counts['refused']} refused")
    assert counts["refused"] > EXAMPLES // 4
