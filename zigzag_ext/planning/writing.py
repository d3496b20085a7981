"""Writing files whole or not at all: the one way in which this package writes results.

Content goes to a temporary file beside the target, to the disk, and then takes the target's name. So a full disk, an error or
`kill -9` leaves the old file. Writers of one folder take turns by its advisory lock (flock), which ends with its holder: a
temporary file that is found under the lock was left by a process that died, and is removed.
"""

import fcntl
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .reading import read_bytes

_PARTIAL = ".zigzag-partial"


def write(path: str | os.PathLike, content: bytes) -> None:
    """Makes `content` that of the file at `path`, or of what a symlink there points to.

    A file that was there keeps its mode and, where that is allowed, its owner. What is not a regular file (/dev/null, a pipe) is
    written to as it stands.

    Raises:
        FileNotFoundError: the folder does not exist. IsADirectoryError, PermissionError or another OSError: as the system says;
            a regular file is then what it was.
    """
    update(path, lambda old: content)


def update(path: str | os.PathLike, change: Callable[[bytes | None], bytes], what: str = "a file", limit: int = 0) -> None:
    """`write(path, change(old content))`, between which no other process writes. `old` is None where there is no file.

    Args:
        what, limit: as in `read_bytes`; with limit 0 nothing is read, and `old` is None.
    """
    if is_stream(path):
        write_pieces(path, (change(None) for _ in range(1)))
        return
    target, old = _target(path)
    with locked(target.parent) as alone:
        content = change(read_bytes(target, what, limit) if limit and target.exists() else None)
        _replace(target, old, [content], alone)


def write_pieces(path: str | os.PathLike, pieces: Iterable[bytes | memoryview]) -> None:
    """`write` of content that comes in pieces, and so may be larger than memory. An error between pieces leaves the old file."""
    if is_stream(path):
        with open(path, "wb", buffering=0) as stream:
            for piece in pieces:
                _write_all(stream.fileno(), piece)
        return
    target, old = _target(path)
    with locked(target.parent) as alone:
        _replace(target, old, pieces, alone)


def is_stream(path: str | os.PathLike) -> bool:
    """Whether there is something at `path` that cannot be replaced: a device, a pipe, a file that lives by its handle only."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    if stat.S_ISREG(found.st_mode):
        return not os.path.exists(os.path.realpath(path))  # /dev/stdout of a file that was deleted
    return not stat.S_ISDIR(found.st_mode)


def check_writable(path: str | os.PathLike) -> None:
    """Raises what `write(path, ...)` would raise, as far as that can be told by making a file beside it, and removing it."""
    if is_stream(path):
        if not os.access(path, os.W_OK):
            raise PermissionError(f"{path} cannot be written: permission denied")
        return
    target, old = _target(path)
    with locked(target.parent) as alone, _partial(target, old, alone):
        pass


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Holds the lock of a folder; False where the file system has none or the folder may not be read."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        alone = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(handle)


def _target(path: str | os.PathLike) -> tuple[Path, os.stat_result | None]:
    """The file that a write to `path` means, symlinks followed, and its state; None where there is no file yet."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; the name of a file is expected")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} to write {target.name} in")
    try:
        found = os.stat(target)
    except FileNotFoundError:
        return target, None
    if not os.access(target, os.W_OK):
        raise PermissionError(f"{path} cannot be written: permission denied")
    return target, found


@contextmanager
def _partial(target: Path, old: os.stat_result | None, alone: bool) -> Iterator[tuple[int, Path]]:
    """An open temporary file beside `target`, with the mode that `target` has or would get. It is gone in the end."""
    start = f".{target.name[:40]}."  # 40 characters are at most 160 of the 255 bytes of a name
    if alone:
        ours = re.compile(re.escape(start) + "[0-9a-f]{16}" + re.escape(_PARTIAL))
        for left in [entry.name for entry in os.scandir(target.parent) if ours.fullmatch(entry.name)]:
            (target.parent / left).unlink(missing_ok=True)
    partial = target.parent / f"{start}{secrets.token_hex(8)}{_PARTIAL}"
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        if old is not None:
            with suppress(PermissionError):
                os.fchown(handle, old.st_uid, old.st_gid)
            os.fchmod(handle, stat.S_IMODE(old.st_mode))
        yield handle, partial
    finally:
        os.close(handle)
        partial.unlink(missing_ok=True)


def _replace(target: Path, old: os.stat_result | None, pieces: Iterable[bytes | memoryview], alone: bool) -> None:
    try:
        with _partial(target, old, alone) as (handle, partial):
            for piece in pieces:
                _write_all(handle, piece)
            os.fsync(handle)
            os.replace(partial, target)
    except OSError as error:
        text = f"{target} was not written and is as it was: {error.strerror or error}"
        raise (OSError(error.errno, text) if error.errno else OSError(text)) from error
    with suppress(OSError):  # some file systems cannot: the name is then as safe as they make it
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _write_all(handle: int, content: bytes | memoryview) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(handle, left) :]
