"""Weights in tiles of words as a plain matrix, for products of many tokens and of any groups."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.launch import overlap_options, settle_keys, wait_for_previous
from engine.kernels.quantized.words import (
    PLANE,
    TILE_ROWS,
    TILE_WORDS,
    WordMatrix,
    first_word_row,
    group_addresses,
    scales_of,
    table_rows,
)

_BLOCK_N = 64


@triton.jit
def _values(codes, groups, tables, TABLES: tl.constexpr):
    # Of [BLOCK_N, 16] codes, in fp32.
    if TABLES:
        values = tl.load(tables[:, None] + codes).to(tl.float32)
    else:
        values = (codes - (groups & 0xFF)).to(tl.float32)
    return values * scales_of(groups, TABLES)


@triton.jit
def dequantize_kernel(
    words_ptr,  # int32 [tiles, blocks, 128, 16]
    groups_ptr,  # int32 [tiles, G, 128]
    table_ptr,  # [1 or N, 16] or None
    out_ptr,  # [rows, K], the outputs from `begin` on
    begin,
    n,
    k,
    rows,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TABLES: tl.constexpr,
    PACKED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program writes the numbers of one block of K of BLOCK_N outputs."""
    blocks = tl.cdiv(k, BLOCK_K)
    first = tl.program_id(0) // blocks * BLOCK_N
    block = tl.program_id(0) % blocks
    row = tl.arange(0, BLOCK_N)
    first_row = first_word_row(begin + first, block, blocks).to(tl.int64)
    within = row[:, None] * TILE_WORDS + tl.arange(0, TILE_WORDS)[None, :]
    words = tl.load(words_ptr + first_row * TILE_WORDS + within)
    wait_for_previous(OVERLAP)
    num_groups = 1
    if GROUP:
        num_groups = tl.cdiv(k, GROUP)
    tables = row
    if TABLES:
        tables = table_rows(table_ptr, begin + first, n, TABLES, BLOCK_N)
    own_groups = group_addresses(groups_ptr, begin + first, num_groups, BLOCK_N)
    place = first + row
    out_rows = out_ptr + place.to(tl.int64)[:, None] * k
    MASK: tl.constexpr = (1 << BITS) - 1
    for plane in tl.static_range(BLOCK_K // PLANE):
        columns = block * BLOCK_K + plane * PLANE + 2 * tl.arange(0, TILE_WORDS)
        if GROUP:
            # Neighbours may be of two groups, where groups are odd.
            low_group = tl.minimum(columns // GROUP, num_groups - 1)
            high_group = tl.minimum((columns + 1) // GROUP, num_groups - 1)
            low_groups = tl.load(own_groups[:, None] + low_group[None, :] * TILE_ROWS)
            high_groups = tl.load(own_groups[:, None] + high_group[None, :] * TILE_ROWS)
        else:
            low_groups = tl.load(own_groups)[:, None]
            high_groups = low_groups
        low = _values((words >> (BITS * plane)) & MASK, low_groups, tables, TABLES)
        high = _values((words >> (BITS * plane + 16)) & MASK, high_groups, tables, TABLES)
        values = tl.reshape(tl.join(low, high), (BLOCK_N, PLANE))
        inputs = (block * BLOCK_K + plane * PLANE + tl.arange(0, PLANE))[None, :]
        mask = (inputs < k) & (place < rows)[:, None]
        tl.store(out_rows + inputs, values.to(out_ptr.dtype.element_ty), mask=mask)


settle_keys(_values)


def dequantize(matrix: WordMatrix, begin: int, out: torch.Tensor) -> None:
    """Writes outputs of a matrix, from `begin` on, a multiple of 64, to out [rows, K]."""
    rows, k = out.shape
    assert k == matrix.k
    assert begin % _BLOCK_N == 0
    assert out.is_contiguous()
    dequantize_kernel[(triton.cdiv(rows, _BLOCK_N) * matrix.blocks,)](
        matrix.words,
        matrix.groups,
        matrix.table,
        out,
        begin,
        matrix.n,
        k,
        rows,
        **matrix.constants,
        BLOCK_N=_BLOCK_N,
        num_warps=4,
        **overlap_options(),
    )
