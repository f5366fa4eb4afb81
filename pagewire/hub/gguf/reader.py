"""Reads the headers of a GGUF file's parts and maps their tensors.

The format is fixed by the GGUF specification of the ggml project (versions 2 and 3, little-endian). The
`gguf` package has a reader too; it makes one numpy object per array element, which costs seconds on a
tokenizer's arrays, and it does not check extents, so a truncated file fails later and obscurely.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from pagewire.base.errors import ConfigError
from pagewire.hub.gguf.parts import gguf_parts

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
# Far beyond any model. A file that asks for more would cost minutes and gigabytes to look at.
_MAX_HEADER_BYTES = 64 * 1024**2
_MAX_KEYS = 2**16
_MAX_TENSORS = 2**17
_MAX_ALIGNMENT = 2**20
_PART_NUMBER, _PART_COUNT, _PART_TENSORS = "split.no", "split.count", "split.tensors.count"
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor as it lies in the file.

    Attributes:
        shape: row-major, so the reverse of the order in the file: the last dimension is contiguous.
        data: uint8 [rows, bytes per row], a view into the mapped file.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A parsed GGUF file. The tensors stay mapped as long as it lives.

    Attributes:
        path: where it lies; of a split model, its first part.
        metadata: values by key.
        tensors: those of all parts, by name, in the order of the files.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def require(self, key: str, expected: type) -> Any:
        """The metadata value of a key.

        Raises:
            ConfigError: it is missing or of another type than `expected`.
        """
        if key not in self.metadata:
            raise ConfigError(f"{self.path}: the metadata key {key} is missing; is the file complete?")
        return self.optional(key, expected, None)

    def optional(self, key: str, expected: type, default: Any) -> Any:
        """The metadata value of a key, or the default if it is missing.

        Raises:
            ConfigError: it is of another type than `expected`.
        """
        value = self.metadata.get(key, default)
        if key in self.metadata and type(value) is not expected:  # a bool is no int here
            raise ConfigError(
                f"{self.path}: {key} is a {type(value).__name__}; it must be a {expected.__name__}"
            )
        return value


def read_gguf(path: Path) -> GgufFile:
    """Parses the header and maps the tensors, without reading their data. The parts of a model that is split
    into several files are read as one, whichever of them is named; the first holds the metadata.

    Raises:
        ConfigError: a file cannot be read, is not GGUF, is truncated or contradicts itself, or parts are
            missing or do not belong together.
    """
    parts = [_read_part(part) for part in gguf_parts(path)]
    _require_whole(parts)
    tensors: dict[str, GgufTensor] = {}
    for part in parts:
        if twice := part.tensors.keys() & tensors.keys():
            raise ConfigError(f"{part.path}: has the tensor {min(twice)[:80]!r}, and so has another part")
        tensors |= part.tensors
    return GgufFile(parts[0].path, parts[0].metadata, tensors)


def _require_whole(parts: list[GgufFile]) -> None:
    """The parts number themselves as their names do. Whole files may do so too, as one part of one."""
    for index, part in enumerate(parts):
        count = part.optional(_PART_COUNT, int, 0)
        if len(parts) == 1 and count <= 1:
            return
        number = part.optional(_PART_NUMBER, int, -1)
        if (number, count) != (index, len(parts)):
            raise ConfigError(
                f"{part.path}: is part {number + 1} of {count} by its metadata and part {index + 1} of "
                f"{len(parts)} by its name; parts keep their names, as in model-00001-of-00003.gguf"
            )
    total = sum(len(part.tensors) for part in parts)
    expected = parts[0].optional(_PART_TENSORS, int, total)
    if total != expected:
        raise ConfigError(f"{parts[0].path}: its parts have {total} tensors in all; it announces {expected}")


def _read_part(path: Path) -> GgufFile:
    try:
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    cursor = _Cursor(path, mapped)
    try:
        return _parse(path, mapped, cursor)
    except UnicodeDecodeError as error:
        raise cursor.broken(
            f"holds text that is not UTF-8, near byte {cursor.offset:,} ({error.reason})"
        ) from error


def _parse(path: Path, mapped: npt.NDArray[np.uint8], cursor: _Cursor) -> GgufFile:
    if cursor.take(4) != _MAGIC:
        raise ConfigError(f"{path}: not a GGUF file: it does not start with 'GGUF'")
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        raise ConfigError(f"{path}: GGUF version {version}; versions 2 and 3, little-endian, can be read")
    tensor_count, metadata_count = cursor.scalar("Q"), cursor.scalar("Q")
    if tensor_count > _MAX_TENSORS or metadata_count > _MAX_KEYS:
        raise cursor.broken(
            f"announces {tensor_count:,} tensors and {metadata_count:,} metadata keys; at most "
            f"{_MAX_TENSORS:,} and {_MAX_KEYS:,} are read"
        )
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.string()
        if key in metadata:
            raise cursor.broken(f"has the metadata key {key!r} twice")
        metadata[key] = cursor.value(cursor.scalar("I"))
    infos = [_read_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    is_power = isinstance(alignment, int) and alignment > 0 and not alignment & (alignment - 1)
    if not is_power or alignment > _MAX_ALIGNMENT:
        raise cursor.broken(
            f"has the alignment {alignment}; it must be a power of two, at most {_MAX_ALIGNMENT}"
        )
    start = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for info in infos:
        if info.name in tensors:
            raise cursor.broken(f"lists the tensor {info.name!r} twice")
        tensors[info.name] = _map_tensor(path, mapped, info, start)
    _require_apart(cursor, infos, tensors)
    return GgufFile(path, metadata, tensors)


def _require_apart(cursor: _Cursor, infos: list[_TensorInfo], tensors: dict[str, GgufTensor]) -> None:
    """No two tensors share bytes. Without this, a small file could stand for terabytes of weights."""
    end, before = 0, ""
    for info in sorted(infos, key=lambda info: info.offset):
        if info.offset < end:
            raise cursor.broken(f"has the tensors {before!r} and {info.name!r} in the same place")
        end, before = info.offset + tensors[info.name].data.nbytes, info.name


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    name: str
    type_id: int
    shape: tuple[int, ...]
    offset: int


def _read_tensor_info(cursor: _Cursor) -> _TensorInfo:
    name = cursor.string()
    n_dims = cursor.scalar("I")
    if not 1 <= n_dims <= _MAX_DIMS:
        raise cursor.broken(f"has {n_dims} dimensions in tensor {name!r}; 1 to {_MAX_DIMS} are possible")
    shape = tuple(cursor.scalar("Q") for _ in range(n_dims))[::-1]
    return _TensorInfo(name, cursor.scalar("I"), shape, cursor.scalar("Q"))


def _map_tensor(path: Path, mapped: npt.NDArray[np.uint8], info: _TensorInfo, start: int) -> GgufTensor:
    try:
        tensor_type = GGMLQuantizationType(info.type_id)
        block_size, type_size = GGML_QUANT_SIZES[tensor_type]
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{path}: tensor {info.name!r} has the unknown type {info.type_id}") from error
    rows, columns = math.prod(info.shape[:-1]), info.shape[-1]
    if columns == 0 or rows == 0 or columns % block_size:
        raise ConfigError(
            f"{path}: tensor {info.name!r} has the shape {info.shape}, which {tensor_type.name} "
            f"(blocks of {block_size}) cannot have"
        )
    row_bytes = columns // block_size * type_size
    begin, end = start + info.offset, start + info.offset + rows * row_bytes
    if end > mapped.size:
        raise ConfigError(
            f"{path}: truncated: tensor {info.name!r} ends at byte {end:,} and the file at {mapped.size:,}; "
            "fetch it again"
        )
    return GgufTensor(info.name, tensor_type, info.shape, mapped[begin:end].reshape(rows, row_bytes))


class _Cursor:
    """Reads forward through the header and never past the end of the file."""

    def __init__(self, path: Path, mapped: npt.NDArray[np.uint8]) -> None:
        self.offset = 0
        self._path = path
        # Slicing and unpacking a memoryview is much faster than a numpy array.
        self._view = mapped.data[:_MAX_HEADER_BYTES]
        self._is_whole = len(self._view) == mapped.size

    def take(self, size: int) -> bytes:
        end = self.offset + size
        if end > len(self._view):
            raise self._ends("its header")
        taken = bytes(self._view[self.offset : end])
        self.offset = end
        return taken

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def value(self, type_id: int) -> Any:
        if type_id == _STRING:
            return self.string()
        if type_id == _ARRAY:
            return self._array(self.scalar("I"), self.scalar("Q"))
        if type_id in _SCALARS:
            return self.scalar(_SCALARS[type_id])
        raise self.broken(f"has metadata of the unknown type {type_id}")

    def _array(self, type_id: int, count: int) -> list[Any]:
        if type_id == _STRING:
            return self._strings(count)
        if type_id not in _SCALARS:
            raise self.broken(f"has an array of type {type_id}; only strings and numbers are possible")
        item = np.dtype("<" + _SCALARS[type_id])
        values: list[Any] = np.frombuffer(self.take(count * item.itemsize), dtype=item).tolist()
        return values

    def _strings(self, count: int) -> list[str]:
        """Tokenizers have hundreds of thousands of these, so the loop is kept tight."""
        unpack_length, view, offset = struct.Struct("<Q").unpack_from, self._view, self.offset
        strings = []
        try:
            for _ in range(count):
                begin = offset + 8
                offset = begin + unpack_length(view, offset)[0]
                strings.append(str(view[begin:offset], "utf-8"))
        except (struct.error, OverflowError) as error:
            raise self._ends("an array of strings") from error
        if offset > len(view):
            raise self._ends("an array of strings")
        self.offset = offset
        return strings

    def _ends(self, where: str) -> ConfigError:
        if self._is_whole:
            return self.broken(f"ends inside {where}; fetch it again")
        return self.broken(f"has a header of more than {_MAX_HEADER_BYTES} bytes, which is not read")

    def broken(self, what: str) -> ConfigError:
        return ConfigError(f"{self._path}: corrupt or truncated GGUF file: it {what}")
