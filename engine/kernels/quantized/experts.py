"""What experts with weights in tiles of words make of their tokens.

As in experts/grouped.py a program computes one tile of the output for one block of an expert's pairs, over
all of K: an element's value depends only on its token and its expert, and a token's experts are added up in
the order in which it chose them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.experts.grouped import combine_kernel
from engine.kernels.experts.parts import Gating, gated
from engine.kernels.experts.sort import SortedPairs, sort_pairs
from engine.kernels.launch import overlap_options, settle_keys, wait_for_previous
from engine.kernels.quantized.tiles import WordConfig
from engine.kernels.quantized.words import (
    TILE_ROWS,
    WordMatrix,
    first_word_row,
    group_addresses,
    load_groups,
    scales_of,
    values_of,
)
from engine.kernels.tensor_cores import settled

# By tokens of a tile.
_TILES = {
    16: WordConfig(16, num_stages=4),
    32: WordConfig(32, num_stages=4),
    64: WordConfig(64, num_stages=4),
    128: WordConfig(128, num_stages=3),
}
# With one tile for all numbers of tokens, a token's result is the same instructions' in every step.
_INVARIANT_BLOCK_M = 64
_GATE_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class ExpertWords:
    """A matrix of each expert.

    Attributes:
        matrix: the tiles of all experts, one's below the other's; `n` and `k` are one expert's.
        bias: [E, n] or None.
    """

    matrix: WordMatrix
    bias: torch.Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.matrix.words.shape[0] // triton.cdiv(self.matrix.n, 128)


@triton.jit
def _expert_rows(bias_ptr, expert, channels, N: tl.constexpr):
    return tl.load(bias_ptr + expert.to(tl.int64) * N + channels, mask=channels < N, other=0.0)


@triton.jit(do_not_specialize=["num_blocks"])
def expert_words_kernel(
    x_ptr,  # [T, K], or [P, K] in the order of the pairs
    words_desc,  # int32 [E * tiles * blocks * 128, 16], blocks of [BLOCK_N, 16]
    groups_ptr,  # int32 [E * tiles, G, 128]
    bias_ptr,  # [E, N] or None
    pairs_ptr,  # int32 [P]
    blocks_ptr,  # int32 [3, num_blocks]
    out_ptr,  # [P, N]: in the order of the pairs, or each in its own place
    num_blocks,
    X_STRIDE: tl.constexpr,
    TOP_K: tl.constexpr,  # where x's rows are tokens; 0 for pairs in order, whose results go to their places
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
    PACKED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_previous(OVERLAP)
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP else 1
    # The blocks of an expert are neighbours, and read the same weights.
    block, tile = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    expert = tl.load(blocks_ptr + block)
    if expert >= 0:
        places = tl.load(blocks_ptr + num_blocks + block) + tl.arange(0, BLOCK_M)
        held = places < tl.load(blocks_ptr + 2 * num_blocks + block)
        pairs = tl.load(pairs_ptr + places, mask=held, other=0)
        rows = pairs // TOP_K if TOP_K else tl.where(held, places, 0)
        x_rows = x_ptr + rows.to(tl.int64)[:, None] * X_STRIDE
        # Each expert's outputs begin with a tile of their own.
        first_n = expert * ((N + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS) + tile * BLOCK_N
        addresses = group_addresses(groups_ptr, first_n, GROUPS, BLOCK_N)
        groups = load_groups(addresses, 0, GROUPS, GROUP, BLOCK_K)
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for number in range(BLOCKS):
            words = words_desc.load([first_word_row(first_n, number, BLOCKS), 0])
            columns = number * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
            if K % BLOCK_K == 0:
                x = tl.load(x_rows + columns)
            else:
                x = tl.load(x_rows + columns, mask=columns < K, other=0.0)
            if GROUP:
                next_groups = load_groups(addresses, number + 1, GROUPS, GROUP, BLOCK_K)
            w = values_of(words, groups, groups, dtype, BLOCK_N, BLOCK_K, BITS, 0, SCALED, PACKED)
            if SCALED or not GROUP:
                acc = settled(tl.dot(w, x.T, acc, input_precision="ieee"))
            else:
                acc += tl.dot(w, x.T, input_precision="ieee") * scales_of(groups, 0)
            if GROUP:
                groups = next_groups
        if not GROUP:
            acc *= scales_of(groups, 0)
        channels = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        result = acc.T
        if bias_ptr is not None:
            result += _expert_rows(bias_ptr, expert, channels, N)[None, :].to(tl.float32)
        targets = places if TOP_K else pairs
        addresses = out_ptr + targets.to(tl.int64)[:, None] * N + channels[None, :]
        tl.store(addresses, result.to(dtype), mask=held[:, None] & (channels < N)[None, :])


@triton.jit
def gate_kernel(
    gate_up_ptr,  # [P, 2 * N]
    out_ptr,  # [P, N]
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program computes BLOCK channels of one pair."""
    programs: tl.constexpr = (N + BLOCK - 1) // BLOCK
    pair = (tl.program_id(0) // programs).to(tl.int64)
    channels = tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    mask = channels < N
    source = gate_up_ptr + pair * (2 * N) + channels
    wait_for_previous(OVERLAP)
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + N, mask=mask, other=0.0).to(tl.float32)
    result = gated(gate, up, KIND, ALPHA, LIMIT)
    tl.store(out_ptr + pair * N + channels, result.to(out_ptr.dtype.element_ty), mask=mask)


settle_keys(_expert_rows)


def apply_word_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    shares: torch.Tensor,
    gate_up: ExpertWords,
    down: ExpertWords,
    gating: Gating,
    *,
    deterministic: bool = False,
) -> torch.Tensor:
    """The weighted sum of what each token's experts make of it; experts/naive.py defines it.

    Args:
        x: [T, H], last dimension contiguous, rows aligned to 16 bytes.
        experts: [T, k] int32.
        shares: what each expert's result is multiplied with, [T, k] fp32.
        gate_up: [E, 2 * I, H], rows of gate before those of up; down: [E, H, I]. Both `fits_tiles`.
        deterministic: have each token's result bitwise the same whatever else is in the step.

    Returns:
        [T, H] in x's dtype.
    """
    if x.shape[0] == 0:
        return torch.empty_like(x)
    num_tokens, top_k = experts.shape
    num_pairs, hidden, inner = experts.numel(), x.shape[1], down.matrix.k
    config = _choose(num_pairs, gate_up.num_experts, deterministic=deterministic)
    pairs = sort_pairs(experts, gate_up.num_experts, config.block_m)
    gate_up_out = x.new_empty(num_pairs, 2 * inner)
    _multiply(x, gate_up, pairs, gate_up_out, config, top_k=top_k)
    activated = x.new_empty(num_pairs, inner)
    block = min(_GATE_BLOCK, triton.next_power_of_2(inner))
    gate_kernel[(num_pairs * triton.cdiv(inner, block),)](
        gate_up_out,
        activated,
        N=inner,
        BLOCK=block,
        KIND=gating.kind,
        ALPHA=gating.alpha,
        LIMIT=gating.limit,
        num_warps=4,
        **overlap_options(),
    )
    made = x.new_empty(num_pairs, hidden)
    _multiply(activated, down, pairs, made, config, top_k=0)
    out = x.new_empty(num_tokens, hidden)
    block = min(1024, triton.next_power_of_2(hidden))
    combine_kernel[(num_tokens * triton.cdiv(hidden, block),)](
        made, shares, out, TOP_K=top_k, N=hidden, BLOCK=block, num_warps=4, **overlap_options()
    )
    return out


def _choose(num_pairs: int, num_experts: int, *, deterministic: bool) -> WordConfig:
    """As many tokens as an expert has on average, or more."""
    if deterministic:
        return _TILES[_INVARIANT_BLOCK_M]
    return next((_TILES[most] for most in _TILES if num_pairs <= most * num_experts), _TILES[max(_TILES)])


def _multiply(
    x: torch.Tensor,
    weights: ExpertWords,
    pairs: SortedPairs,
    out: torch.Tensor,
    config: WordConfig,
    *,
    top_k: int,
) -> None:
    matrix = weights.matrix
    assert matrix.fits_tiles
    assert matrix.table is None
    constants = matrix.constants
    del constants["TABLES"]
    expert_words_kernel[(pairs.max_blocks * triton.cdiv(matrix.n, config.block_n),)](
        x,
        matrix.descriptor(config.block_n),
        matrix.groups,
        weights.bias,
        pairs.pairs,
        pairs.blocks,
        out,
        pairs.max_blocks,
        X_STRIDE=x.stride(0),
        TOP_K=top_k,
        N=matrix.n,
        K=matrix.k,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SCALED=matrix.scales_weights(config.block_m),
        num_warps=config.num_warps,
        num_stages=matrix.stages(config.block_m, config.block_n, config.num_stages),
        **constants,
        **overlap_options(),
    )
