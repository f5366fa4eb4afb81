"""Where a file of `torch.save` keeps its tensors, read from its header alone.

Such a file (pytorch_model.bin) is a ZIP archive without compression: a pickle names the tensors, and the
bytes of each lie in a record of their own. Unpickling can run what a file says. So the pickle is read by
stricter rules than those of `torch.load(weights_only=True)`: dictionaries, lists, numbers, text and tensors,
and the functions that it names are never called; what stands for a tensor becomes its dtype, shape and place
in the file.

The format: torch/serialization.py and torch/_utils.py of PyTorch.
"""

from __future__ import annotations

import io
import math
import pickle  # nosec B403 # see _Header
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from engine.loader.stream import DTYPES, MAX_DIMENSIONS, MAX_HEADER_BYTES, MAX_TENSORS, StoredTensor

# torch.save's names for storages whose elements have a type; newer dtypes are named beside an UntypedStorage.
_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_LOCAL_HEADER_BYTES = 30
# What zipfile raises for damaged archives: names that are no text, places that are negative, and more.
_ZIP_FAULTS = (zipfile.BadZipFile, EOFError, OverflowError, RuntimeError, ValueError, struct.error)
_ZIP_MAGIC = b"PK\x03\x04"


class TorchFileError(ValueError):
    """A file is not one of tensors that `torch.save` wrote, or holds something else too."""


@dataclass(frozen=True, slots=True)
class _Storage:
    """A record of bytes: its name among the archive's, and the type of its elements."""

    key: str
    dtype: torch.dtype
    num_elements: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A view of a storage; offset and strides are counted in elements of `dtype`."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Record:
    """Where a record's bytes lie in the file."""

    begin: int
    num_bytes: int


def stored_tensors(path: Path) -> list[StoredTensor]:
    """The file's tensors in the order of their bytes. No more than the header is read.

    Raises:
        TorchFileError: it is damaged or truncated, was written before PyTorch 1.6, or holds anything but
            tensors by name.
        OSError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
                raise TorchFileError(
                    "it is not in the format that torch.save has had since PyTorch 1.6; convert it to "
                    "safetensors"
                )
            with zipfile.ZipFile(file) as archive:
                header, records = _read_archive(archive, file, path.stat().st_size)
    except TorchFileError:
        raise
    except _ZIP_FAULTS as error:
        raise TorchFileError(f"it is damaged or cut short: {error}") from error
    tensors = [
        _stored(path, name, tensor, records) for name, tensor in _named_tensors(_Header.read(header)).items()
    ]
    return sorted(tensors, key=lambda tensor: tensor.begin)


def _read_archive(
    archive: zipfile.ZipFile, file: io.BufferedReader, file_bytes: int
) -> tuple[bytes, dict[str, _Record]]:
    """The pickle, and the records of numbers by their keys."""
    pickles = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise TorchFileError("it is a ZIP archive, but not one that torch.save wrote: it has no data.pkl")
    root = pickles[0].filename.removesuffix("data.pkl")
    records: dict[str, _Record] = {}
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise TorchFileError(f"its record {info.filename!r} is compressed, which torch.save never does")
        if info.filename.startswith(f"{root}data/"):
            records[info.filename.removeprefix(f"{root}data/")] = _record(info, file, file_bytes)
        elif info.filename == f"{root}byteorder" and archive.read(info) != b"little":
            raise TorchFileError("its numbers are not little-endian")
    if pickles[0].file_size > MAX_HEADER_BYTES:
        raise TorchFileError(
            f"its header has {pickles[0].file_size} bytes; at most {MAX_HEADER_BYTES} are read"
        )
    return archive.read(pickles[0]), records


def _record(info: zipfile.ZipInfo, file: io.BufferedReader, file_bytes: int) -> _Record:
    """A record's bytes come after a header of their own, whose two last fields are the lengths of a name and
    of padding (APPNOTE.TXT 4.3.7)."""
    file.seek(info.header_offset)
    name_bytes, extra_bytes = struct.unpack("<HH", file.read(_LOCAL_HEADER_BYTES)[26:])
    begin = info.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    if begin + info.file_size > file_bytes:
        raise TorchFileError(f"it ends within its record {info.filename!r}")
    return _Record(begin, info.file_size)


def _named_tensors(content: object) -> dict[str, _Tensor]:
    if not isinstance(content, Mapping):
        raise TorchFileError(f"it holds a {type(content).__name__}; tensors by name are needed")
    if len(content) > MAX_TENSORS:
        raise TorchFileError(f"it has {len(content)} tensors; at most {MAX_TENSORS} are read")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise TorchFileError(
                f"it holds a {type(value).__name__} under {name!r}; tensors by name are needed"
            )
    return dict(content)


def _stored(path: Path, name: str, tensor: _Tensor, records: Mapping[str, _Record]) -> StoredTensor:
    """The tensor's place in the file, after checking that it lies in its record."""
    itemsize = tensor.dtype.itemsize
    record = records.get(tensor.storage.key)
    if record is None:
        raise TorchFileError(f"the numbers of tensor {name!r} are not in it")
    if len(tensor.shape) > MAX_DIMENSIONS:
        raise TorchFileError(
            f"tensor {name!r} has {len(tensor.shape)} dimensions; at most {MAX_DIMENSIONS} are read"
        )
    span = _span(tensor.shape, tensor.strides)
    begin, num_bytes = tensor.offset * itemsize, span * itemsize
    if begin + num_bytes > min(record.num_bytes, tensor.storage.num_elements * tensor.storage.dtype.itemsize):
        raise TorchFileError(f"tensor {name!r} of shape {list(tensor.shape)} is larger than its numbers")
    contiguous = span == math.prod(tensor.shape) and tensor.strides == _contiguous_strides(tensor)
    strides = None if contiguous else tensor.strides
    return StoredTensor(path, name, tensor.dtype, tensor.shape, record.begin + begin, num_bytes, strides)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from a tensor's first to its last."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _contiguous_strides(tensor: _Tensor) -> tuple[int, ...]:
    """The strides that the tensor has where its elements lie in order. Those of dimensions of one element say
    nothing and are taken as they are."""
    strides: list[int] = []
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        strides.append(stride if size <= 1 else step)
        step *= size
    return tuple(reversed(strides))


# The unpickler that is written in Python, because the one in C takes as much memory as a file tells it to.
class _Header(pickle._Unpickler):
    """Reads data.pkl. Names are looked up in a list of our own and nowhere else."""

    @classmethod
    def read(cls, data: bytes) -> object:
        """What the pickle holds, with a `_Tensor` for each tensor.

        Raises:
            TorchFileError: it holds anything else, or is damaged.
        """
        try:
            return cls(io.BytesIO(data)).load()
        except TorchFileError:
            raise
        # Whatever its damaged instructions do to our few values, such as to call a number.
        except Exception as error:
            raise TorchFileError(f"its header is damaged: {type(error).__name__}: {error}") from error

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return _STORAGE_DTYPES[name]
        known = _FUNCTIONS.get((module, name))
        if known is not None:
            return known
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise TorchFileError(
            f"it holds {module}.{name}, which is code and no tensor; such files can do harm and are not read"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _device, num_elements = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise TorchFileError(f"it holds a {kind!r}; tensors by name are needed")
        if not isinstance(key, str) or not _is_size(num_elements):
            raise TorchFileError(f"its storage {key!r} has {num_elements!r} elements")
        return _Storage(key, dtype, num_elements)

    def get_extension(self, code: int) -> NoReturn:
        """Extensions are looked up in a registry of the process."""
        raise TorchFileError(f"it holds the extension {code}; tensors by name are needed")


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: Any, strides: Any, *_grad: object, dtype: torch.dtype | None = None
) -> _Tensor:
    sizes = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides) or not all(map(_is_size, sizes)):
        raise TorchFileError("it holds a tensor of no possible shape")
    dtype = storage.dtype if dtype is None else dtype
    if dtype not in DTYPES.values():
        raise TorchFileError(f"a tensor is of {dtype}; known are {', '.join(map(str, DTYPES.values()))}")
    return _Tensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _rebuild_tensor_v3(
    storage: _Storage,
    offset: int,
    shape: Any,
    strides: Any,
    requires_grad: object,
    hooks: object,
    dtype: torch.dtype,
    *_more: object,
) -> _Tensor:
    return _rebuild_tensor(storage, offset, shape, strides, dtype=dtype)


def _rebuild_parameter(data: _Tensor, *_more: object) -> _Tensor:
    return data


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
}
