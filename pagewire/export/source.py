"""A checkpoint as plain tensors, read one at a time, whatever its files hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Protocol

import torch

from engine.loader.blocks import dequantize
from engine.loader.checkpoint import Checkpoint, readable
from engine.loader.stream import StoredTensor
from engine.loader.weights import mapped
from pagewire.base.gguf_blocks import block_size


class Source(Protocol):
    """The tensors of a model, by the names that its checkpoint has for them.

    Attributes:
        tensors: what there is, as plain tensors have it: `dtype` and `shape` are those of `read`.
    """

    tensors: Sequence[StoredTensor]

    def read(self, name: str) -> torch.Tensor:
        """A tensor, in host memory and the caller's own.

        Raises:
            ConfigError: a file cannot be read.
        """
        ...


class CheckpointSource:
    """The files of a checkpoint that is not quantized, or has matrices in GGML's blocks, which become
    numbers.

    Args:
        dtype_of_blocks: what those become.
    """

    def __init__(self, checkpoint: Checkpoint, dtype_of_blocks: torch.dtype) -> None:
        self._dtype = dtype_of_blocks
        self._stored = {each.name: each for stored in checkpoint.files.values() for each in stored}
        self.tensors: Sequence[StoredTensor] = [self._plain(each) for each in self._stored.values()]

    def read(self, name: str) -> torch.Tensor:
        stored = self._stored[name]
        tensor = read_stored(stored)
        return dequantize(tensor, stored.blocks, self._dtype) if stored.blocks else tensor

    def _plain(self, stored: StoredTensor) -> StoredTensor:
        if not stored.blocks:
            return stored
        values, num_bytes = block_size(stored.blocks)
        shape = (stored.shape[0], stored.shape[1] // num_bytes * values)
        return replace(stored, shape=shape, dtype=self._dtype, blocks="")


def read_stored(stored: StoredTensor) -> torch.Tensor:
    """One tensor of a file, as it is there.

    Raises:
        ConfigError: the file cannot be read.
    """
    with ExitStack() as stack:
        stack.enter_context(readable(stored.path))
        tensor_of = stack.enter_context(mapped(stored.path))
        return tensor_of(stored).clone()


def size_in(stored: StoredTensor, dtype: torch.dtype | None) -> int:
    """The bytes of a tensor, in this dtype where that is given and the tensor has floating-point numbers."""
    count = 1
    for size in stored.shape:
        count *= size
    is_plain = stored.dtype.is_floating_point and stored.dtype.itemsize > 1
    return count * (dtype if dtype is not None and is_plain else stored.dtype).itemsize


def as_dtype(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The tensor in this dtype, if one is given and it has floating-point numbers of two bytes or more."""
    is_plain = tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
    return tensor.to(dtype) if dtype is not None and is_plain else tensor


def under(tensors: Sequence[StoredTensor], prefix: str) -> Iterator[StoredTensor]:
    """Those whose names begin so."""
    return (each for each in tensors if each.name.startswith(prefix))
