"""Reading arrays from .npy, .npz and .pt files: what a header promises is compared with the file before it is believed.

No pickled object is made from an .npy or .npz file. Of a .pt file, torch reads one dense tensor with `weights_only=True`, after
the names in its pickle were compared with the few that such a tensor needs.
"""

import io
import math
import os
import pickletools
import sys
import zipfile

import numpy as np

from .reading import MIB, located, read_bytes, shown

MAX_BYTES = 64 * MIB  # of a file, and of what is unpacked from it
MAX_ELEMENTS = 1 << 20  # of a score matrix, layers x KV heads
_PICKLE = 1 << 16  # bytes of the pickle of a .pt file; that of one tensor has fewer than 500
_NPY_HEADER = 10_000  # bytes; numpy writes fewer than 200 for a plain array
# What the pickle of a dense tensor or parameter names, beside the storage and dtype.
_DENSE = {
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter",
    "collections OrderedDict", "torch.storage UntypedStorage",
}  # fmt: skip
_REFUSED = {
    "_rebuild_sparse_tensor": "a sparse tensor: save tensor.to_dense()",
    "_rebuild_sparse_csr_tensor": "a sparse tensor: save tensor.to_dense()",
    "_rebuild_meta_tensor_no_storage": "a meta tensor, which has no numbers",
    "_rebuild_qtensor": "a quantised tensor: save tensor.dequantize()",
    "_rebuild_nested_tensor": "a nested tensor: save a dense one",
    "_reconstruct": "a numpy array: save it with numpy.save as .npy",
}


def read_npy(path: str | os.PathLike, what: str) -> tuple[np.ndarray, bytes]:
    """The array of an .npy file, and the bytes behind it. Raises as the readers of `reading` do."""
    content = read_bytes(path, what, MAX_BYTES)
    with located(f"{path} is not {what}"):
        return parse_npy(content)


def parse_npy(content: bytes) -> tuple[np.ndarray, bytes]:
    """The array in the bytes of an .npy file, read-only, and what is behind it. Raises ValueError."""
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file, max_header_size=_NPY_HEADER)
    except Exception as error:  # numpy evaluates the header as Python: tokens, syntax, types and keys fail in their own ways
        raise ValueError(f"its header is damaged ({type(error).__name__}: {shown(str(error))})") from None
    if dtype.hasobject or dtype.kind not in "fiubcU":
        raise ValueError(f"it holds {dtype}; numbers are expected")
    count, rest = math.prod(shape), len(content) - file.tell()
    if any(size < 0 for size in shape) or count * dtype.itemsize > rest:
        raise ValueError(f"its header says {dtype} {shown(list(shape))}, {count * dtype.itemsize} bytes, and {rest} bytes follow")
    flat = np.frombuffer(content, dtype, count, file.tell()) if count else np.empty(0, dtype)
    if dtype.kind == "U" and flat.nbytes and flat.view(np.dtype("u4").newbyteorder(dtype.byteorder)).max() > sys.maxunicode:
        raise ValueError("it holds text with characters beyond Unicode")  # of which Python would make a broken string
    return flat.reshape(shape, order="F" if fortran else "C"), content[len(content) - rest + count * dtype.itemsize :]


def read_npz(path: str | os.PathLike, what: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file that `numpy.savez` wrote, uncompressed. Raises as the readers of `reading` do."""
    content = read_bytes(path, what, MAX_BYTES)
    with located(f"{path} is not {what}"):
        return {name.removesuffix(".npy"): parse_npy(data)[0] for name, data in _members(content).items()}


def read_pt(path: str | os.PathLike, what: str) -> np.ndarray:
    """The numbers of a dense tensor or `nn.Parameter` that `torch.save` wrote, as float64. Raises as the readers of `reading` do.

    Files of torch before 1.6, which are no zip files, are refused. Needs torch.
    """
    content = read_bytes(path, what, MAX_BYTES)
    with located(f"{path} is not {what}"):
        _check_pickle(_members(content))
        return _load_tensor(content)


def _members(content: bytes) -> dict[str, bytes]:
    """The members of a zip file, none of them compressed: together they are no larger than the limit of a file."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            if len({entry.filename for entry in entries}) != len(entries):
                raise ValueError("two of its members have one name")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("its members are compressed; uncompressed ones are expected")
            if (size := sum(entry.file_size for entry in entries)) > MAX_BYTES:
                raise ValueError(f"its members say that they have {size} bytes together; at most {MAX_BYTES} are read")
            return {entry.filename: archive.read(entry) for entry in entries}
    except ValueError:
        raise
    except Exception as error:  # of many types, by what is damaged
        raise ValueError(f"it is not a zip file of arrays, or a damaged one ({shown(str(error))})") from None


def _check_pickle(members: dict[str, bytes]) -> None:
    """Raises ValueError unless the pickle of a .pt file names what a dense tensor consists of, and nothing else."""
    pickles = [data for name, data in members.items() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"it holds {len(pickles)} files data.pkl, torch.save writes one")
    if any(data != b"little" for name, data in members.items() if name.endswith("/byteorder")):
        raise ValueError("it was not written on a little-endian machine")
    if len(pickles[0]) > _PICKLE:
        raise ValueError(f"its pickle has {len(pickles[0])} bytes, that of one tensor has fewer than {_PICKLE}")
    try:
        named = [(code.name, argument) for code, argument, _ in pickletools.genops(pickles[0])]
    except Exception as error:  # damaged pickles fail in many ways: ValueError, IndexError, UnicodeDecodeError, OverflowError
        raise ValueError(f"its pickle is damaged ({shown(str(error))})") from None
    for code, name in named:
        if code == "GLOBAL" and name not in _DENSE and name.partition(" ")[0] != "torch":
            found = _REFUSED.get(name.rpartition(" ")[2], f"an object that names {shown(name)}")
            raise ValueError(f"it holds {found}; expected: one dense tensor")
        if code in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"its pickle has the opcode {code}, which torch.save does not write")


def _load_tensor(content: bytes) -> np.ndarray:
    import torch  # for this format only

    try:
        tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of many types, by what is damaged
        raise ValueError(f"torch cannot load it ({type(error).__name__}: {shown(str(error).partition(chr(10))[0])})") from None
    if not isinstance(tensor, torch.Tensor) or tensor.is_complex():
        raise ValueError(f"it must hold one tensor of real numbers, got {_type_of(tensor)}")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise ValueError(f"it holds a tensor of layout {tensor.layout} on {tensor.device}; a dense one is expected")
    if tensor.numel() > MAX_ELEMENTS or tensor.untyped_storage().nbytes() > len(content):
        raise ValueError(f"its tensor {shown(list(tensor.shape))} is larger than the file, or than {MAX_ELEMENTS} numbers")
    try:
        return tensor.detach().double().numpy()
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"numbers of {tensor.dtype} are not read ({shown(str(error))})") from None


def _type_of(value) -> str:
    return f"{value.dtype} {list(value.shape)}" if hasattr(value, "dtype") else type(value).__name__
