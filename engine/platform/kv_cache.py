"""The KV pool: how many blocks it holds, and its memory."""

from __future__ import annotations

import logging
import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from engine.attention.interface import LayerKVCache
from engine.dispatch.limits import longest_request
from engine.models.kv_groups import KVGroups
from engine.platform.device import available_memory
from pagewire.base.errors import ConfigError

logger = logging.getLogger(__name__)

GIB = 1024**3
DEFAULT_CPU_BYTES = 4 * GIB


@dataclass(frozen=True, slots=True)
class KVCacheShape:
    """What one worker keeps for each token.

    Attributes:
        groups: its layers, of which a block serves one group.
        num_kv_heads, head_dim: on this worker.
        block_size: tokens per block.
        dtype: of keys and values.
    """

    groups: KVGroups
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers of a group, keys and values."""
        values = 2 * self.groups.group_size * self.block_size * self.num_kv_heads * self.head_dim
        return values * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class KVCacheSize:
    """The pool's blocks and the longest request they can hold, in tokens."""

    num_blocks: int
    max_model_len: int


def default_cpu_bytes() -> int:
    """4 GiB, or a quarter of the machine's available memory where that is less."""
    return min(DEFAULT_CPU_BYTES, available_memory() // 4)


def size_kv_cache(
    shape: KVCacheShape,
    *,
    num_blocks: int | None,
    available_bytes: int,
    max_model_len: int,
    max_num_seqs: int,
) -> KVCacheSize:
    """How many blocks to allocate, and what that leaves of max_model_len.

    Args:
        num_blocks: exactly this many; None takes what fits `available_bytes`, but no more than
            `max_num_seqs` requests of `max_model_len` can use.

    Raises:
        ConfigError: not even one block of each KV group fits.
    """
    windows = shape.groups.windows
    in_groups = "" if len(windows) == 1 else f" for {len(windows)} groups of layers"
    if num_blocks is None:
        useful = max_num_seqs * -(-max_model_len // shape.block_size) * len(windows)
        num_blocks = min(available_bytes // shape.block_bytes, useful)
    if num_blocks < len(windows):
        raise ConfigError(
            f"the KV pool has room for {num_blocks} blocks{in_groups}: one block of {shape.block_size} "
            f"tokens takes {shape.block_bytes} bytes and {max(available_bytes, 0)} bytes are available; free "
            "memory or raise the limit (kv_cache_memory on the CPU, gpu_memory_utilization on a GPU)"
        )
    held = longest_request(max_model_len, num_blocks, shape.block_size, windows)
    if held < max_model_len:
        logger.warning(
            "max_model_len is cut from %d to %d tokens: the KV pool holds %d blocks of %d tokens%s",
            max_model_len,
            held,
            num_blocks,
            shape.block_size,
            in_groups,
        )
    return KVCacheSize(num_blocks, held)


@dataclass(frozen=True, slots=True)
class KVPool:
    """A worker's KV memory.

    Attributes:
        blocks: [group_size, 2, num_blocks, block_size, num_kv_heads, head_dim]; keys, then values.
        layers: the same, one entry per layer; layers with the same place in their groups have the same entry,
            since no block is in two block tables of different groups.
    """

    blocks: torch.Tensor
    layers: Sequence[LayerKVCache]

    def copy(self, sources: torch.Tensor, destinations: torch.Tensor) -> None:
        """Copies blocks, by their ids [n], int64; all are read before any is written."""
        self.blocks[:, :, destinations] = self.blocks[:, :, sources]


def allocate_kv_pool(
    shape: KVCacheShape,
    num_blocks: int,
    device: torch.device,
    scales: Sequence[tuple[float, float]] = (),
) -> KVPool:
    """The pool, zeroed. On the CPU the system commits its pages as they are written.

    Args:
        scales: of each layer's keys and values, for a dtype of 8 bits; by default 1.

    Raises:
        ConfigError: the memory is not to be had.
    """
    places = shape.groups.place_of
    size = (shape.groups.group_size, 2, num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)
    try:
        pool = (
            _lazy_zeros(math.prod(size) * shape.dtype.itemsize).view(shape.dtype).view(size)
            if device.type == "cpu"
            else torch.zeros(size, dtype=shape.dtype, device=device)
        )
    except (RuntimeError, OSError, OverflowError) as error:
        total = num_blocks * shape.block_bytes
        raise ConfigError(f"a KV pool of {num_blocks} blocks ({total} bytes) cannot be allocated") from error
    layers = [LayerKVCache(pool[place, 0], pool[place, 1]) for place in places]
    if shape.dtype.itemsize == 1:
        for layer, own in zip(layers, scales or [(1.0, 1.0)] * len(layers), strict=True):
            layer.scales = torch.tensor(own, dtype=torch.float32, device=device)
    return KVPool(pool, layers)


def _lazy_zeros(num_bytes: int) -> torch.Tensor:
    """Zeroed bytes whose pages the system commits as they are first written.

    Small pages, because a block is a few KiB in each layer: with huge ones the first tokens of a request
    would have the system clear 2 MiB for every layer's keys and again for its values.
    """
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages refuses the advice and needs none
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
