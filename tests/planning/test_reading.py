"""Readers of files that others made: each way in which one can be wrong is one line that names file and place, at little cost."""

import io
import json
import os
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch

from zigzag_ext.planning import arrays, exchange, reading
from zigzag_ext.planning.costs import ms_costs
from zigzag_ext.planning.plan import Plan
from zigzag_ext.planning.scores import load_scores, save_scores

PLAN = {"format": "zigzag-plan", "version": 1, "kinds": ["retrieval", "streaming"], "sink": 4, "window": 8}


def refusal(read, path) -> str:
    with pytest.raises(ValueError) as raised:
        read(path)
    text = str(raised.value)
    assert str(path) in text and "\n" not in text and len(text) < 1000
    return text


def put(path, content: bytes):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "text, message",
    [
        (json.dumps(PLAN)[:-1] + ', "sink": 5}', "the key 'sink' stands twice"),
        (json.dumps(PLAN)[:-1] + ', "provenance": {"a": 1, "a": 1}}', "the key 'a' stands twice"),
        (json.dumps(PLAN | {"kinds": {"retrieval": 1, "streaming": 2}}), "kinds must be a list"),
        (json.dumps(PLAN | {"kinds": ["retrieval", {"streaming": 1}]}), "got {'streaming': 1} for layer 1"),
        (json.dumps(PLAN | {"kv_format": {"k": {}, "v": []}}), "kv_format"),
        (json.dumps(PLAN | {"sink": 10**400}), "sink does not fit 64 bits"),
        (json.dumps(PLAN | {"window": "x" * 100_000}), "window must be an integer"),
        (json.dumps(PLAN | {"version": 10**400}), "from a newer zigzag_ext"),
        (json.dumps(PLAN | {"x" * 100_000: 1}), "unknown fields: xxx"),
        (json.dumps(PLAN)[:-1] + ', "window": ' + "9" * 5000 + "}", "not JSON"),
        (json.dumps(PLAN)[:-1] + ', "provenance": {"a": ' + "[" * 70 + "]" * 70 + "}}", "nest deeper than 64"),
        ('{"a":' * 100_000, "nest deeper than 64"),
        (" " * reading.MAX_TEXT + "{}", "more than 4 MiB"),
    ],
)
def test_plans_with_what_no_plan_has(tmp_path, text, message):
    assert message in refusal(Plan.load, put(tmp_path / "p.json", text.encode()))


def test_a_byte_order_mark_is_no_content(tmp_path):
    assert Plan.load(put(tmp_path / "p.json", b"\xef\xbb\xbf" + json.dumps(PLAN).encode())).sink == 4
    assert load_scores(put(tmp_path / "s.tsv", b"\xef\xbb\xbf0.5\t1\n")).tolist() == [[0.5, 1.0]]
    table = b'\xef\xbb\xbf{"context": [1, 3], "retrieval": [1, 3], "streaming": [1, 1]}'
    assert ms_costs(put(tmp_path / "c.json", table), 2, 1)[0].tolist() == [2]
    assert "UTF-16" in refusal(Plan.load, put(tmp_path / "u.json", json.dumps(PLAN).encode("utf-16")))


def test_huge_layer_values_and_control_characters_do_not_reach_the_terminal(tmp_path):
    provenance = {"layer_values": [10**400, 1], "note\x1b[2J": "a\x1b]0;title\x07\nb\u202ec", "long": "x" * 100_000}
    text = Plan.load(put(tmp_path / "p.json", json.dumps(PLAN | {"provenance": provenance}).encode())).summary()
    assert "\x1b" not in text and "\u202e" not in text and "\\x1b]0;title\\x07 b" in text and len(text) < 3000


def test_provenance_that_could_not_be_read_back_is_refused():
    deep = []
    for _ in range(100):
        deep = [deep]
    for wrong in ({"a": deep}, {1: "a", "1": "b"}):
        with pytest.raises(TypeError, match="provenance must hold what JSON can hold"):
            Plan(["retrieval"], sink=0, window=1, provenance=wrong)
    for unordered in ({"retrieval"}, {"retrieval": 1}, b"retrieval"):
        with pytest.raises(TypeError, match="kinds must be a list"):
            Plan(unordered, sink=0, window=1)


def costs(path):
    return ms_costs(path, 1, 1)


@pytest.mark.parametrize("read, what", [(Plan.load, "a plan file"), (load_scores, "a text file"), (costs, "a cost table")])
def test_endless_files_are_read_to_the_limit(read, what, tmp_path):
    for path in ("/dev/zero", put(tmp_path / "sparse", b"")):
        if path != "/dev/zero":
            os.truncate(path, 1 << 40)
        assert f"is not {what}" in refusal(read, path)


def test_a_pipe_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=[json.dumps(PLAN)])
    writer.start()
    assert Plan.load(tmp_path / "pipe").window == 8
    writer.join()


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"sink_size": 1}', "JSON object with sink_size and recent_size"),
        (b'{"sink_size": 1, "recent_size": "x"}', "config.json: recent_size must be an integer"),
        (b'{"sink_size": 1, "sink_size": 2, "recent_size": 3}', "stands twice"),
    ],
)
def test_duo_config(tmp_path, content, message):
    put(tmp_path / "full_attention_heads.tsv", b"1 0\n")
    put(tmp_path / "config.json", content)
    with pytest.raises(ValueError, match=message):
        exchange.from_duo(tmp_path)


@pytest.mark.parametrize("content, message", [(b"[]", "must be a JSON object"), (b'{"context": 1}', "cost table: missing")])
def test_cost_tables_are_named(tmp_path, content, message):
    assert message in refusal(costs, put(tmp_path / "c.json", content))


@pytest.mark.parametrize("text, message", [("x" * 300_000, "s.csv:1: 'xxx"), ("0.5," + "9" * 300_000, "s.csv:1: score 999")])
def test_a_long_field(tmp_path, text, message):
    assert message in refusal(load_scores, put(tmp_path / "s.csv", text.encode()))


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    "content, message",
    [
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000), }", b"\0" * 16), "and 16 bytes follow"),
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-1, 2), }"), "its header says"),
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (2, 2), }", b"\0" * 31), "and 31 bytes follow"),
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1, 2)"), "header is damaged"),
        (npy("(" * 2000), "header is damaged"),
        (npy("{1: 2, 'descr': 3}"), "header is damaged"),
        (npy("{'descr': [('a', 'O')], 'fortran_order': False, 'shape': (1,), }"), "numbers are expected"),
        (npy("'" + "x" * 60_000 + "'"), "header is damaged"),
        (b"\x93NUMPY\x09\x00\x01\x00 ", "header is damaged"),
        (b"", "header is damaged"),
    ],
)
def test_npy_headers(tmp_path, content, message):
    assert message in refusal(load_scores, put(tmp_path / "s.npy", content))


def test_more_scores_than_any_model_has(tmp_path):
    np.save(tmp_path / "s.npy", np.zeros((1025, 1024), dtype=np.float16))
    assert "more scores than 1048576" in refusal(load_scores, tmp_path / "s.npy")
    text = "\n".join(["0 " * 1024] * 1025)
    assert "s.tsv:1025: there are more scores" in refusal(load_scores, put(tmp_path / "s.tsv", text.encode()))
    np.save(tmp_path / "f.npy", np.asfortranarray([[0.0, 0.25, 0.5], [1, 0.75, 0]]))
    assert load_scores(tmp_path / "f.npy").tolist() == [[0.0, 0.25, 0.5], [1, 0.75, 0]]


def saved(value, **options) -> bytes:
    content = io.BytesIO()
    torch.save(value, content, **options)
    return content.getvalue()


@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_kinds_are_named_or_read(tmp_path):
    dense = torch.tensor([[0.5, 0.25]])
    for content in (saved(torch.nn.Parameter(dense)), saved(dense.half()), saved(torch.ones(2, 2).expand(2, 2)[:1])):
        assert load_scores(put(tmp_path / "s.pt", content)).shape == (1, 2)
    for value, message in [
        (dense.to_sparse(), "a sparse tensor: save tensor.to_dense()"),
        (dense.to_sparse_csr(), "a sparse tensor"),
        (torch.empty(2, 2, device="meta"), "a meta tensor"),
        (torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8), "a quantised tensor"),
        (dense.numpy(), "a numpy array: save it with numpy.save"),
        ({"a": dense}, "must hold one tensor of real numbers, got dict"),
        (torch.zeros(1, 1).expand(1 << 20, 1 << 20), "is larger than the file"),
        ([torch.zeros(1) for _ in range(1000)], "its pickle has"),
    ]:
        assert message in refusal(load_scores, put(tmp_path / "s.pt", saved(value)))
    assert "not a zip file" in refusal(load_scores, put(tmp_path / "s.pt", saved(dense, _use_new_zipfile_serialization=False)))


@pytest.mark.parametrize("content", [b"", b"0.5 0.5\n", b"PK\x03\x04", b"\x80\x02cos\nsystem\n."])
def test_files_that_are_no_tensor(tmp_path, content):
    assert "is not a torch-saved tensor" in refusal(load_scores, put(tmp_path / "s.pt", content))


def test_a_storage_that_the_file_does_not_hold(tmp_path):
    """The pickle of a tensor says how large its storage is; believed, memory beyond the file would be read."""
    members = arrays._members(saved(torch.rand(2, 3)))
    name = next(name for name in members if name.endswith("data.pkl"))
    members[name] = members[name].replace(b"K\x06t", b"J\x00\x00\x10\x00t").replace(b"K\x02K\x03\x86", b"M\x00\x02M\x00\x02\x86")
    with zipfile.ZipFile(tmp_path / "s.pt", "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    refusal(load_scores, tmp_path / "s.pt")


def state(path):
    return arrays.read_npz(path, "a state")


def test_archives_that_unpack_to_more(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", b"\0" * (1 << 20))
    assert "compressed" in refusal(state, tmp_path / "bomb.npz")
    with zipfile.ZipFile(tmp_path / "large.npz", "w") as archive:
        archive.writestr("a.npy", b"\0" * 1000)
    content = (tmp_path / "large.npz").read_bytes()
    sizes = content.index(b"PK\x01\x02") + 20  # of the member, in the directory at the end: stored, then unpacked
    put(tmp_path / "large.npz", content[:sizes] + b"\xff\xff\xff\x7f" * 2 + content[sizes + 8 :])
    assert "2147483647 bytes together" in refusal(state, tmp_path / "large.npz")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "twice.npz", "w") as archive:
        archive.writestr("a.npy", b"1")
        archive.writestr("a.npy", b"2")
    assert "two of its members have one name" in refusal(state, tmp_path / "twice.npz")
    np.savez(tmp_path / "good.npz", a=np.arange(3), b=np.array("text"))
    found = state(tmp_path / "good.npz")
    assert found["a"].tolist() == [0, 1, 2] and str(found["b"]) == "text"


def test_refusing_takes_little_memory(tmp_path):
    """Headers that promise a terabyte, in a process that may take 1 GiB more than it has."""
    put(tmp_path / "s.npy", npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000), }", b"\0" * 16))
    put(tmp_path / "s.pt", saved(torch.zeros(1, 1).expand(1 << 20, 1 << 20)))
    code = f"""
import resource, torch, zigzag_ext as zz
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, [pages * resource.getpagesize() + (1 << 30)] * 2)
for name in ("s.npy", "s.pt"):
    try:
        zz.load_scores({str(tmp_path)!r} + "/" + name)
    except ValueError as error:
        print(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["s.npy", "s.pt"], done.stderr


def test_what_is_written_is_not_too_large_to_be_read(tmp_path):
    save_scores(np.full((512, 512), 1 / 3), tmp_path / "s.tsv")
    assert (tmp_path / "s.tsv").stat().st_size > reading.MAX_TEXT and load_scores(tmp_path / "s.tsv").shape == (512, 512)
    with pytest.raises(ValueError, match="more scores than 1048576"):
        save_scores(np.zeros((1025, 1024)), tmp_path / "t.tsv")
    with pytest.raises(ValueError, match="shorten its provenance"):
        Plan(["retrieval"], sink=0, window=1, provenance={"x": "x" * reading.MAX_TEXT}).save(tmp_path / "p.json")
    assert [file.name for file in tmp_path.iterdir()] == ["s.tsv"]


def test_one_line_is_one_line():
    assert reading.one_line("a\n b\t\x1b[31mc\u200bd") == "a b \\x1b[31mc\\u200bd"
    assert len(reading.one_line("x" * 10_000, 50)) == 53
    assert len(reading.shown("x" * 10_000)) < 120 and reading.shown("x") == "'x'"
