"""Tensors as Triton's protocol writes them: as bytes, or as JSON."""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pagewire.base.errors import InvalidRequest

MAX_ELEMENTS = 65536
"""Of one tensor. A request has a few prompts, lists of words, and numbers."""

_LENGTH = struct.Struct("<I")

_FORMATS = {
    # by Triton's name: numpy's
    "BOOL": "u1",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
_FRACTIONS = ("FP16", "FP32", "FP64")
DATATYPES = (*_FORMATS, "BYTES")
"""Number formats that are taken."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A small tensor.

    Attributes:
        name: as the model's metadata have it.
        datatype: one of DATATYPES.
        shape: its dimensions.
        values: its elements, row by row: texts, numbers or truth values.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Sequence[Any]


def from_bytes(name: str, datatype: str, shape: Sequence[int], data: bytes) -> Tensor:
    """A tensor whose elements came as bytes: little-endian, and for BYTES each with its length before it.

    Raises:
        InvalidRequest: they are not as many as the shape says, or no text.
    """
    count = num_elements(name, datatype, shape)
    if datatype == "BYTES":
        return Tensor(name, datatype, tuple(shape), _texts(name, count, data))
    numbers = np.dtype(_FORMATS[datatype])
    if len(data) != count * numbers.itemsize:
        raise InvalidRequest(
            f"input {name} has {len(data)} bytes of data; its shape {list(shape)} and datatype {datatype} "
            f"need {count * numbers.itemsize}",
            param=name,
        )
    values = np.frombuffer(data, numbers).tolist()
    return Tensor(name, datatype, tuple(shape), list(map(bool, values)) if datatype == "BOOL" else values)


def from_values(name: str, datatype: str, shape: Sequence[int], values: object) -> Tensor:
    """A tensor whose elements came as JSON, in one list or in nested ones.

    Raises:
        InvalidRequest: they are not as many as the shape says, or not of the datatype.
    """
    count = num_elements(name, datatype, shape)
    flat: list[Any] = []
    _flatten(name, values, flat, depth=len(shape))
    if len(flat) != count:
        raise InvalidRequest(
            f"input {name} has {len(flat)} values; its shape {list(shape)} needs {count}", param=name
        )
    wanted, holds = _kind(datatype)
    for value in flat:
        if not holds(value):
            raise InvalidRequest(f"input {name} has a value that is not {wanted}", param=name)
    return Tensor(name, datatype, tuple(shape), list(map(float, flat)) if datatype in _FRACTIONS else flat)


def to_bytes(tensor: Tensor) -> bytes:
    """The elements of an output as `from_bytes` reads them."""
    if tensor.datatype != "BYTES":
        return np.asarray(tensor.values, _FORMATS[tensor.datatype]).tobytes()
    encoded = [value.encode("utf-8", "surrogatepass") for value in tensor.values]
    return b"".join(_LENGTH.pack(len(value)) + value for value in encoded)


def num_elements(name: str, datatype: str, shape: Sequence[int]) -> int:
    """How many elements a tensor must have.

    Raises:
        InvalidRequest: the datatype or the shape is none that is taken.
    """
    if datatype not in DATATYPES:
        raise InvalidRequest(
            f"input {name} has the datatype {datatype!r}; it must be one of {', '.join(DATATYPES)}",
            param=name,
        )
    if len(shape) > 2 or not all(0 <= dimension <= MAX_ELEMENTS for dimension in shape):
        raise InvalidRequest(
            f"input {name} has the shape {list(shape)}; it must have at most two dimensions, each between 0 "
            f"and {MAX_ELEMENTS}",
            param=name,
        )
    count = math.prod(shape)
    if count > MAX_ELEMENTS:
        raise InvalidRequest(
            f"input {name} has {count} elements; at most {MAX_ELEMENTS} are taken", param=name
        )
    return count


def _texts(name: str, count: int, data: bytes) -> list[str]:
    texts: list[str] = []
    place = 0
    while place < len(data) and len(texts) < count:
        end = place + _LENGTH.size
        if end > len(data) or (end := end + _LENGTH.unpack_from(data, place)[0]) > len(data):
            raise InvalidRequest(f"input {name} ends within an element's length or text", param=name)
        try:
            texts.append(data[place + _LENGTH.size : end].decode())
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"input {name} has a text that is not UTF-8: {error}", param=name) from error
        place = end
    if len(texts) != count or place != len(data):
        raise InvalidRequest(
            f"input {name} has {len(texts)} elements in {place} of its {len(data)} bytes; "
            f"its shape needs {count}",
            param=name,
        )
    return texts


def _flatten(name: str, values: object, flat: list[Any], *, depth: int) -> None:
    if not isinstance(values, list):
        raise InvalidRequest(f"the data of input {name} must be a list", param=name)
    if len(flat) + len(values) > MAX_ELEMENTS:
        raise InvalidRequest(f"input {name} has more than {MAX_ELEMENTS} elements", param=name)
    for value in values:
        if not isinstance(value, list):
            flat.append(value)
        elif depth > 1:
            _flatten(name, value, flat, depth=depth - 1)
        else:
            raise InvalidRequest(f"the data of input {name} is nested deeper than its shape", param=name)


def _is_number(value: object) -> bool:
    """JSON's integers have no limit; those beyond a double's range are no numbers here."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _kind(datatype: str) -> tuple[str, Callable[[Any], bool]]:
    """What values of a datatype are in JSON, in words and as a check."""
    if datatype == "BYTES":
        return "a string", lambda value: isinstance(value, str)
    if datatype == "BOOL":
        return "true or false", lambda value: isinstance(value, bool)
    if datatype in _FRACTIONS:
        return "a number", _is_number
    limits = np.iinfo(_FORMATS[datatype])
    low, high = int(limits.min), int(limits.max)
    return (
        f"a whole number between {low} and {high}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
    )
