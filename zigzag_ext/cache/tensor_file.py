"""Tensors in a safetensors file, larger than memory: written piece by piece, read slice by slice."""

import json
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..planning.reading import MAX_TEXT, MIB, one_line, shown
from ..planning.writing import write_pieces

_MAX_HEADER = 2 * MAX_TEXT  # bytes: a plan of the largest size with its quotes escaped; 200 layers take a tenth of a MiB
_DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8",
    torch.uint8: "U8", torch.int32: "I32",
}  # fmt: skip


def write_tensors(path: str | os.PathLike, parts: dict[str, list[Tensor]], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, whole or not at all (`writing.write`).

    parts: by name, what becomes one tensor, joined along its first dimension; views, of which one at a time is copied.
    """
    ordered = sorted(parts.items(), key=lambda named: -named[1][0].itemsize)  # so that no element crosses its alignment
    header: dict[str, dict] = {"__metadata__": metadata}
    end = 0
    for name, views in ordered:
        start, end = end, end + sum(view.numel() * view.itemsize for view in views)
        shape = [sum(view.shape[0] for view in views), *views[0].shape[1:]]
        header[name] = {"dtype": _DTYPES[views[0].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise ValueError(
            f"the header of the file takes {len(text)} bytes; at most {_MAX_HEADER} are read: shorten the provenance"
        )
    write_pieces(path, _pieces(text, ordered))


def _pieces(header: bytes, ordered: list[tuple[str, list[Tensor]]]) -> Iterator[bytes | memoryview]:
    yield struct.pack("<Q", len(header))
    yield header
    for view in (view for _, views in ordered for view in views):
        if view.numel():
            flat = view.cpu().contiguous().as_strided((view.numel(),), (1,))  # one element is contiguous with any stride
            yield memoryview(flat.view(torch.uint8).numpy())


class TensorFile:
    """An open safetensors file; what it says about a tensor is compared with what is expected before the tensor is read."""

    def __init__(self, file):
        self.file, self.names = file, set(file.keys())
        self.metadata: dict[str, str] = file.metadata() or {}

    def shape(self, name: str) -> list[int]:
        """Raises ValueError if there is no such tensor."""
        if name not in self.names:
            raise ValueError(f"it has no tensor {shown(name)}")
        return self.file.get_slice(name).get_shape()

    def check(self, name: str, shape: Iterable[int], dtype: torch.dtype) -> None:
        """Raises ValueError unless the tensor has this shape and dtype."""
        found, expected = (self.shape(name), self.file.get_slice(name).get_dtype()), (list(shape), _DTYPES[dtype])
        if found != expected:
            raise ValueError(f"{name} is {found[1]} {shown(found[0])}; {expected[1]} {expected[0]} is expected")

    def read(self, name: str, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        self.check(name, shape, dtype)
        return self.file.get_tensor(name)

    def rows(self, name: str, counts: list[int]) -> Iterator[Tensor]:
        """One after the other, counts[i] entries of the first dimension of a tensor that was checked to have their sum."""
        entries, start = self.file.get_slice(name), 0
        for count in counts:
            yield entries[start : start + count]
            start += count


@contextmanager
def open_tensors(path: str | os.PathLike, what: str) -> Iterator[TensorFile]:
    """A safetensors file to read from. ValueError, TypeError and RuntimeError inside become a ValueError that names the file.

    Raises:
        FileNotFoundError, IsADirectoryError or another OSError: it cannot be read. ValueError: it is not `what`.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder, not {what}")
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {what.partition(' ')[2]} at {path}") from None
    if len(start) == 8 and (size := struct.unpack("<Q", start)[0]) > _MAX_HEADER:
        raise ValueError(f"{path} is not {what}: its header says {size} bytes, more than {_MAX_HEADER / MIB:g} MiB")
    try:
        with safe_open(path, framework="pt") as file:
            yield TensorFile(file)
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is not {what} that can be used: {one_line(str(error))}") from error
