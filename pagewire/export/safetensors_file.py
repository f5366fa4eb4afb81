"""Writing a safetensors file one tensor at a time: the bytes of its tensors never are in memory together.

The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.loader.stream import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written, and what makes it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """In the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> Entry:
        """One that is there already."""
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def write_file(path: Path, entries: Sequence[Entry]) -> None:
    """Writes the file whole or not at all: a reader never sees a part of it, however the writer ends.

    Raises:
        OSError: it cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.num_bytes
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            tensor = entry.make()
            assert tuple(tensor.shape) == entry.shape, entry.name
            assert tensor.dtype == entry.dtype, entry.name
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
