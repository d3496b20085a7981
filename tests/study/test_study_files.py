"""What identify and evaluate write: known to be writable before the first step, whole, and refused where it was edited."""

import csv
import os
import stat
import threading

import numpy as np
import pytest

import zigzag_ext as zz
from zigzag_ext.planning import writing
from zigzag_ext.study import evaluate
from zigzag_ext.study.evaluate import results

SMALL = {"sink": 4, "window": 32, "tokens": 1600, "prompts": 3}
ROW = evaluate.Row("m", "cpu", "float32", "passkey", "p", "01", 4, 8, "", 100, 0.5, 0, 2, 0.5, 0.1, 0.9, -1.0, -2.0, float("inf"))
HEADER = ",".join(results.COLUMNS) + "\n"


def stop_at(step: int):
    def advance(done, total):
        if done == step:
            raise KeyboardInterrupt

    return advance


@pytest.mark.parametrize("output, error, message", [
    ("none/s.tsv", FileNotFoundError, "there is no folder"),
    ("s.pt", ValueError, "cannot write scores as .pt"),
    ("file", ValueError, "is in the way of a folder"),
    ("folder.tsv/x/s.tsv", FileNotFoundError, "there is no folder"),
])  # fmt: skip
def test_identify_knows_before_its_first_step_that_it_cannot_write(model, tokenizer, tmp_path, output, error, message):
    (tmp_path / "file").touch()
    steps = []
    with pytest.raises(error, match=message):
        zz.identify(model, tokenizer, "lazy", output=tmp_path / output, advance=lambda *at: steps.append(at), **SMALL)
    assert not steps and [file.name for file in tmp_path.iterdir()] == ["file"]


def test_identify_knows_of_a_full_disk_before_its_first_step(model, tokenizer, tmp_path, monkeypatch):
    real = os.open

    def full(path, flags, *mode, **options):
        if flags & os.O_CREAT:
            raise OSError(28, "No space left on device")
        return real(path, flags, *mode, **options)

    steps = []
    monkeypatch.setattr(writing.os, "open", full)
    with pytest.raises(OSError, match="No space left"):
        zz.identify(model, tokenizer, "lazy", output=tmp_path / "s.tsv", advance=lambda *at: steps.append(at), **SMALL)
    assert not steps and not list(tmp_path.iterdir())


def test_identify_writes_to_a_device_without_a_state_beside_it(model, tokenizer):
    before = set(os.listdir("/dev"))
    with pytest.raises(KeyboardInterrupt):
        zz.identify(model, tokenizer, "lazy", output="/dev/null", advance=stop_at(2), **SMALL)
    zz.identify(model, tokenizer, "lazy", output="/dev/null", **SMALL | {"prompts": 1})
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and set(os.listdir("/dev")) == before


def test_identify_follows_a_symlink(model, tokenizer, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "s.tsv").symlink_to(tmp_path / "there" / "s.tsv")
    scores = zz.identify(model, tokenizer, "lazy", output=tmp_path / "s.tsv", **SMALL | {"prompts": 1})
    assert (tmp_path / "s.tsv").is_symlink() and np.array_equal(zz.load_scores(tmp_path / "there" / "s.tsv"), scores)


EDITS = {
    "done": lambda state: {"done": np.array(1)},
    "more done than there is": lambda state: {"done": np.array(99)},
    "numbers": lambda state: {"mass": state["mass"] + 1},
    "shape": lambda state: {"mass": state["mass"][:1]},
    "type": lambda state: {"mass": state["mass"].astype(np.float32)},
    "another array": lambda state: {"more": np.zeros(3)},
    "no digest": lambda state: {"digest": None},
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_state_that_was_edited_is_refused_by_name(model, tokenizer, tmp_path, edit):
    output, partial = tmp_path / "s.tsv", tmp_path / "s.tsv.partial.npz"
    with pytest.raises(KeyboardInterrupt):
        zz.identify(model, tokenizer, "lazy", output=output, advance=stop_at(2), **SMALL)
    with np.load(partial) as file:
        state = dict(file)
    state = {name: value for name, value in (state | EDITS[edit](state)).items() if value is not None}
    np.savez(partial, **state)
    content = partial.read_bytes()
    with pytest.raises(ValueError, match="s.tsv.partial.npz is damaged: its checksum .* delete it to start again"):
        zz.identify(model, tokenizer, "lazy", output=output, **SMALL)
    assert partial.read_bytes() == content


def test_a_state_with_a_right_checksum_must_fit_too(model, tokenizer, tmp_path):
    from zigzag_ext.study.identify.run import _digest

    output, partial = tmp_path / "s.tsv", tmp_path / "s.tsv.partial.npz"
    with pytest.raises(KeyboardInterrupt):
        zz.identify(model, tokenizer, "lazy", output=output, advance=stop_at(2), **SMALL)
    with np.load(partial) as file:
        state = {name: value for name, value in file.items() if name != "digest"}
    for edit in ("more done than there is", "shape", "type", "another array"):
        edited = state | EDITS[edit](state)
        np.savez(partial, digest=np.array(_digest(edited)), **edited)
        with pytest.raises(ValueError, match=r"no state of this run: expected mass \[3, 2\] float64 after 1 to 3 steps"):
            zz.identify(model, tokenizer, "lazy", output=output, **SMALL)


def test_a_table_whose_last_line_has_no_end_is_refused_and_kept(tmp_path):
    path = tmp_path / "rows.csv"
    evaluate.append(path, [ROW, ROW])
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="rows.csv:3: the line has no end.*complete or delete it"):
        evaluate.append(path, [ROW])
    assert path.read_bytes() == whole[:-3]
    path.write_bytes(whole)
    evaluate.append(path, [ROW])
    assert evaluate.read(path) == [ROW] * 3


def test_rows_are_added_all_or_none(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    path.touch()  # as a full disk has left it
    evaluate.append(path, [ROW])
    before = path.read_bytes()
    assert before.startswith(HEADER.encode())
    monkeypatch.setattr(writing.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="is as it was: No space left"):
        evaluate.append(path, [ROW])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="plan must be 1 to 1000 printable characters"):
        evaluate.append(path, [ROW, ROW.__class__(**ROW.__dict__ | {"plan": "a\nb"})])
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["rows.csv"]


def test_two_processes_may_add_to_one_table(tmp_path):
    path = tmp_path / "rows.csv"
    threads = [threading.Thread(target=lambda: [evaluate.append(path, [ROW]) for _ in range(10)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert evaluate.read(path) == [ROW] * 30


def test_rows_go_to_a_pipe_and_to_nowhere(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for rows, expected in (([], HEADER), ([ROW], "m,cpu,")):
        read = []
        reader = threading.Thread(target=lambda read=read: read.append((tmp_path / "pipe").read_text()))
        reader.start()
        evaluate.append(tmp_path / "pipe", rows)
        reader.join()
        assert read[0].startswith(expected) and len(read[0].splitlines()) == 1
        evaluate.append("/dev/null", rows)


def test_tables_of_other_programs(tmp_path):
    """A byte-order mark, other line ends and quotes are what spreadsheets add; what is beside the columns is refused."""
    path = tmp_path / "rows.csv"
    evaluate.append(path, [ROW])
    text = path.read_text()
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert evaluate.read(path) == [ROW]
    with path.open("w", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(csv.reader(text.splitlines()))
    assert evaluate.read(path) == [ROW]
    for damage in (text[:-1] + ",1\n", text.replace("0.5", "0.5\0"), HEADER + '"' + "x" * 200_000 + "\n", text + "a\n"):
        path.write_text(damage)
        with pytest.raises(ValueError, match=r"rows\.csv:[123]: "):
            evaluate.read(path)
    path.write_bytes(b"\xff\xfe" + text.encode("utf-16-le"))
    with pytest.raises(ValueError, match="looks like UTF-16"):
        evaluate.read(path)
