"""The one writer: old content or new, whole, whatever fails; and where it writes if the name is not that of a plain file."""

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest

from zigzag_ext.planning import writing
from zigzag_ext.planning.plan import Plan
from zigzag_ext.planning.scores import check_output, load_scores, save_scores
from zigzag_ext.planning.writing import check_writable, update, write

PLAN = Plan(["retrieval", "streaming"], sink=4, window=8)
WRITERS = {
    "plan": lambda path: PLAN.save(path),
    "scores.tsv": lambda path: save_scores([[0.5]], path),
    "scores.npy": lambda path: save_scores([[0.5]], path),
    "bytes": lambda path: write(path, b"new"),
}
each_writer = pytest.mark.parametrize("name", WRITERS)


def names(folder) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@each_writer
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, name, call):
    path = tmp_path / name
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing.os, call, full)
    with pytest.raises(OSError, match=f"{name} was not written and is as it was: No space left") as raised:
        WRITERS[name](path)
    assert raised.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and names(tmp_path) == [name]


def test_the_limit_of_a_file_leaves_the_old_file(tmp_path):
    """The system's own refusal in the middle of a write, as a full disk or quota gives it."""
    (tmp_path / "f").write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="is as it was: File too large"):
            write(tmp_path / "f", b"x" * 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "f").read_bytes() == b"old" and names(tmp_path) == ["f"]


@each_writer
def test_a_symlink_is_followed_and_the_mode_kept(tmp_path, name):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / name).write_bytes(b"old")
    (tmp_path / "there" / name).chmod(0o640)
    (tmp_path / name).symlink_to(tmp_path / "there" / name)
    WRITERS[name](tmp_path / name)
    assert (tmp_path / name).is_symlink()
    target = tmp_path / "there" / name
    assert target.read_bytes() != b"old" and stat.S_IMODE(target.stat().st_mode) == 0o640 and names(tmp_path / "there") == [name]


def test_a_dangling_symlink_makes_its_target_and_a_loop_is_an_error(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "new")
    write(tmp_path / "link", b"x")
    assert (tmp_path / "new").read_bytes() == b"x" and (tmp_path / "link").is_symlink()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError):
        write(tmp_path / "loop", b"x")
    assert (tmp_path / "loop").is_symlink()


def test_a_new_file_has_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "f", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640


@each_writer
def test_devices_and_pipes_are_written_through(tmp_path, name):
    if name != "scores.npy":
        WRITERS[name]("/dev/null")
        assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    pipe = tmp_path / name
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    WRITERS[name](pipe)
    reader.join()
    WRITERS[name](tmp_path / f"x{name}")
    assert read == [(tmp_path / f"x{name}").read_bytes()] and stat.S_ISFIFO(pipe.stat().st_mode)
    with pytest.raises(OSError, match="No space left"):
        write("/dev/full", b"x")


@pytest.mark.parametrize("to", ["| cat", "> out", "| cat > out"])
def test_standard_output_by_name(tmp_path, to):
    code = "from zigzag_ext import Plan; Plan(['retrieval'], sink=0, window=1).save('/dev/stdout')"
    command = f'"{sys.executable}" -c "{code}" {to}; cat out 2>/dev/null'
    here = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": os.getcwd()}}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, **here)
    assert done.stdout.startswith('{\n "format": "zigzag-plan"'), done.stderr
    assert names(tmp_path) == (["out"] if "out" in to else [])


def test_refusals(tmp_path):
    for action in (write, lambda path, _: check_writable(path)):
        with pytest.raises(FileNotFoundError, match=f"there is no folder {tmp_path}/none to write f in"):
            action(tmp_path / "none" / "f", b"x")
        with pytest.raises(IsADirectoryError, match="is a folder; the name of a file is expected"):
            action(tmp_path, b"x")
        with pytest.raises(OSError, match="too long"):
            action(tmp_path / ("x" * 300), b"x")
    assert not names(tmp_path)
    write(tmp_path / ("\u20ac" * 85), b"x")  # 255 bytes, the longest name that there is
    check_writable(tmp_path / "f")
    assert names(tmp_path) == ["\u20ac" * 85]


def test_a_read_only_file_is_refused(tmp_path, monkeypatch):
    """Its folder would let it be replaced."""
    path = tmp_path / "f"
    path.write_bytes(b"old")
    monkeypatch.setattr(writing.os, "access", lambda path, mode: False)  # root may write to any file
    for action in (lambda: write(path, b"x"), lambda: check_writable(path), lambda: check_writable("/dev/null")):
        with pytest.raises(PermissionError, match="cannot be written: permission denied"):
            action()
    assert path.read_bytes() == b"old"


def test_a_killed_writer_leaves_nothing_that_stays(tmp_path):
    (tmp_path / "f").write_bytes(b"old")
    code = f"""
import os
from zigzag_ext.planning import writing
writing.os.fsync = lambda handle: (print("written", flush=True), writing.os.read(0, 1))
writing.write({str(tmp_path / "f")!r}, b"new" * 1000)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"written\n"
        assert len(names(tmp_path)) == 2
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "f").read_bytes() == b"old" and len(names(tmp_path)) == 2
    (tmp_path / ".f.mine.partial").touch()  # only what has the writer's own form is removed
    write(tmp_path / "f", b"next")
    assert (tmp_path / "f").read_bytes() == b"next" and names(tmp_path) == [".f.mine.partial", "f"]


def test_writers_take_turns(tmp_path):
    """No addition is lost among threads, and no writer removes the temporary file of another."""
    path = tmp_path / "count"

    def add():
        for _ in range(20):
            update(path, lambda old: (old or b"") + b"x", limit=1000)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() == b"x" * 80 and names(tmp_path) == ["count"]


def test_without_a_lock_it_writes_and_removes_nothing(tmp_path, monkeypatch):
    left = tmp_path / f".f.{'0' * 16}.zigzag-partial"
    left.touch()

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(writing.fcntl, "flock", unsupported)
    write(tmp_path / "f", b"x")
    assert names(tmp_path) == [left.name, "f"]
    monkeypatch.undo()
    write(tmp_path / "f", b"y")
    assert names(tmp_path) == ["f"]


def test_a_folder_of_scores_may_be_interrupted_between_its_files(tmp_path, monkeypatch):
    save_scores([[0.25]], tmp_path / "duo", sink=1, window=2)
    before = {name: (tmp_path / "duo" / name).read_bytes() for name in names(tmp_path / "duo")}
    monkeypatch.setattr(writing.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("lost")))
    with pytest.raises(OSError, match="lost"):
        save_scores([[0.5]], tmp_path / "duo", sink=3, window=4)
    monkeypatch.undo()
    assert {name: (tmp_path / "duo" / name).read_bytes() for name in names(tmp_path / "duo")} == before


def test_where_scores_can_go_is_known_before_there_are_any(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.xyz").mkdir()
    for path, message in [
        (tmp_path / "s.pt", "cannot write scores as .pt"),
        (tmp_path / "file", "is in the way of a folder"),
        (tmp_path / "none" / "s.tsv", "there is no folder"),
        (tmp_path / "none" / "folder", "there is no folder"),
    ]:
        for action in (check_output, lambda path: save_scores([[0.5]], path)):
            if path.name != "folder" or action is check_output:  # a folder's parents are made by save_scores
                with pytest.raises((ValueError, OSError), match=message):
                    action(path)
    for path in (tmp_path / "new", tmp_path / "folder.xyz", tmp_path / "s.CSV", "/dev/null"):
        check_output(path)
    assert names(tmp_path) == ["file", "folder.xyz"] and not names(tmp_path / "folder.xyz")
    save_scores([[0.5]], tmp_path / "folder.xyz")
    assert np.array_equal(load_scores(tmp_path / "folder.xyz"), [[0.5]])
