"""Sorts a step's pairs of a token and an expert by expert, on the device, in launches of a fixed size.

Pair p is token p // top_k with its expert number p % top_k. Each expert's pairs are then cut into blocks of
at most `block_m`, which are what programs of the products work on. How many blocks there are only the device
knows; launches are made for the most there can be, and blocks that are not there have no expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.launch import overlap_options, settle_keys, wait_for_previous

# Pairs of one program, and blocks that it describes.
_CHUNK = 256
_BLOCKS = 64
# Chunks whose counts are read at a time.
_COUNTS = 16


@dataclass(frozen=True, slots=True)
class SortedPairs:
    """A step's pairs by expert.

    Attributes:
        pairs: every pair, [P] int32; those of an expert lie together and in order.
        blocks: of each block: its expert, or -1 if there is none; where in `pairs` it begins; where it ends.
            [3, the most blocks there can be] int32.
        block_m: pairs of a block at most.
    """

    pairs: torch.Tensor
    blocks: torch.Tensor
    block_m: int

    @property
    def max_blocks(self) -> int:
        """The most blocks that there can be."""
        return self.blocks.shape[1]


@triton.jit
def _load_chunk(experts_ptr, chunk, num_pairs, CHUNK: tl.constexpr):
    pairs = chunk * CHUNK + tl.arange(0, CHUNK)
    return pairs, tl.load(experts_ptr + pairs, mask=pairs < num_pairs, other=0)


@triton.jit(do_not_specialize=["num_pairs"])
def count_kernel(
    experts_ptr,  # int32 [P]
    counts_ptr,  # int32 [chunks, BLOCK_E]
    num_pairs,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program counts the experts of one chunk of pairs."""
    wait_for_previous(OVERLAP)
    pairs, experts = _load_chunk(experts_ptr, tl.program_id(0), num_pairs, CHUNK)
    counts = tl.histogram(experts, BLOCK_E, mask=pairs < num_pairs)
    tl.store(counts_ptr + tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), counts)


@triton.jit(do_not_specialize=["num_pairs", "num_chunks", "max_blocks"])
def place_kernel(
    experts_ptr,  # int32 [P]
    counts_ptr,  # int32 [chunks, BLOCK_E], or None where there is one chunk
    pairs_ptr,  # int32 [P]
    blocks_ptr,  # int32 [3, max_blocks]
    num_pairs,
    num_chunks,
    max_blocks,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCKS: tl.constexpr,
    COUNTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program places one chunk of pairs, and describes some of the blocks."""
    program = tl.program_id(0)
    wait_for_previous(OVERLAP)
    # Where there is one chunk, every program places it, and all write the same.
    chunk = 0 if counts_ptr is None else program
    pairs, experts = _load_chunk(experts_ptr, chunk, num_pairs, CHUNK)
    columns = tl.arange(0, BLOCK_E)
    before = tl.zeros((BLOCK_E,), dtype=tl.int32)  # pairs of each expert in earlier chunks, and in all
    if counts_ptr is None:
        totals = tl.histogram(experts, BLOCK_E, mask=pairs < num_pairs)
    else:
        totals = tl.zeros((BLOCK_E,), dtype=tl.int32)
        for first in range(0, num_chunks, COUNTS):
            chunks = (first + tl.arange(0, COUNTS))[:, None]
            addresses = counts_ptr + chunks * BLOCK_E + columns[None, :]
            counts = tl.load(addresses, mask=chunks < num_chunks, other=0)
            totals += tl.sum(counts, axis=0)
            before += tl.sum(tl.where(chunks < program, counts, 0), axis=0)
    starts = tl.cumsum(totals, axis=0) - totals
    order = tl.arange(0, CHUNK)
    # The pairs past the end come after all others, and are counted before none of them.
    earlier = (experts[:, None] == experts[None, :]) & (order[None, :] < order[:, None])
    rank = tl.sum(earlier.to(tl.int32), axis=1)
    places = tl.gather(starts + before, experts, 0) + rank
    tl.store(pairs_ptr + places, pairs, mask=pairs < num_pairs)

    num_blocks = (totals + BLOCK_M - 1) // BLOCK_M
    last = tl.cumsum(num_blocks, axis=0)  # of each expert, the number of the block behind its own
    blocks = program * BLOCKS + tl.arange(0, BLOCKS)
    expert = tl.sum((last[None, :] <= blocks[:, None]).to(tl.int32), axis=1)
    known = expert < BLOCK_E
    expert = tl.minimum(expert, BLOCK_E - 1)
    begin = tl.gather(starts, expert, 0) + (blocks - tl.gather(last - num_blocks, expert, 0)) * BLOCK_M
    end = tl.minimum(begin + BLOCK_M, tl.gather(starts + totals, expert, 0))
    mask = blocks < max_blocks
    tl.store(blocks_ptr + blocks, tl.where(known, expert, -1), mask=mask)
    tl.store(blocks_ptr + max_blocks + blocks, begin, mask=mask)
    tl.store(blocks_ptr + 2 * max_blocks + blocks, end, mask=mask)


settle_keys(_load_chunk)


def most_blocks(num_pairs: int, num_experts: int, block_m: int) -> int:
    """The most blocks into which pairs can be cut, however they are spread over the experts."""
    used = min(num_pairs, num_experts)
    return used + (num_pairs - used) // block_m


def sort_pairs(experts: torch.Tensor, num_experts: int, block_m: int) -> SortedPairs:
    """Sorts the pairs of experts [T, k] int32, of which there is at least one."""
    num_pairs = experts.numel()
    max_blocks = most_blocks(num_pairs, num_experts, block_m)
    pairs = experts.new_empty(num_pairs)
    blocks = experts.new_empty(3, max_blocks)
    num_chunks = triton.cdiv(num_pairs, _CHUNK)
    sizes = {"CHUNK": _CHUNK, "BLOCK_E": triton.next_power_of_2(num_experts), **overlap_options()}
    counts = None
    if num_chunks > 1:
        counts = experts.new_empty(num_chunks, sizes["BLOCK_E"])
        count_kernel[(num_chunks,)](experts, counts, num_pairs, num_warps=4, **sizes)
    place_kernel[(max(num_chunks, triton.cdiv(max_blocks, _BLOCKS)),)](
        experts,
        counts,
        pairs,
        blocks,
        num_pairs,
        num_chunks,
        max_blocks,
        BLOCK_M=block_m,
        BLOCKS=_BLOCKS,
        COUNTS=_COUNTS,
        num_warps=8,
        **sizes,
    )
    return SortedPairs(pairs, blocks, block_m)
