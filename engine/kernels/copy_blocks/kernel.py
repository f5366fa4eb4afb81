"""Copies KV blocks, all layers in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:  # needed for annotations alone, and much slower to import than Triton is to compile
    import torch

_BLOCK = 2048


# Indices begin anywhere in a step's words, and pools have any number of blocks: neither must compile anew.
@triton.jit(
    do_not_specialize=["num_blocks"],
    do_not_specialize_on_alignment=["sources", "destinations"],
)
def copy_blocks_kernel(
    pool,  # [num_groups, num_blocks, N]
    sources,
    destinations,
    num_blocks,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (k, g) copies block k of group g: of a layer's keys or its values."""
    source = tl.load(sources + tl.program_id(0)).to(tl.int64)
    destination = tl.load(destinations + tl.program_id(0)).to(tl.int64)
    group = pool + tl.program_id(1).to(tl.int64) * num_blocks * N
    if source >= 0:
        for first in range(0, N, BLOCK):
            number = first + tl.arange(0, BLOCK)
            values = tl.load(group + source * N + number, mask=number < N)
            tl.store(group + destination * N + number, values, mask=number < N)


def copy_blocks(pool: torch.Tensor, sources: torch.Tensor, destinations: torch.Tensor) -> None:
    """pool[:, :, destinations[k]] = pool[:, :, sources[k]], in no order.

    Args:
        pool: [L, 2, N, block_size, HK, D], contiguous.
        sources, destinations: [K] int32 block ids; a source of -1 is skipped. No id is in both, and none
            twice in `destinations`.
    """
    if not sources.shape[0]:
        return
    num_layers, kinds, num_blocks = pool.shape[:3]
    size = pool[0, 0, 0].numel()
    copy_blocks_kernel[(sources.shape[0], num_layers * kinds)](
        pool,
        sources,
        destinations,
        num_blocks,
        N=size,
        BLOCK=min(_BLOCK, triton.next_power_of_2(size)),
        num_warps=4,
    )
