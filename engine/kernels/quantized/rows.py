"""Products of one token with integers in tiles of words, by plain multiply-adds.

A warp reads eight rows' words of a block of K, which lie together, as often as the program has such groups of
rows, and the program's warps take blocks of K side by side. The first words are loaded before the token is
there, and more while it is multiplied; nothing moves between threads until the sums over them are taken at
the end. So all tensors have one dimension: with more, the compiler would choose which thread holds what, and
move it about. Copies through shared memory, some loads ahead, were measured to be slower.

What is left is to make numbers of integers in few instructions: an integer n that is moved to bit 15 or 19 of
a word whose exponent is that of 1.0 is the float 1 + n / 256 or 1 + n / 16. One shift moves two integers of 4
bits. So a sum of such floats times tokens is too large by the sum of the tokens, which is the same for all
rows and is taken off together with the zero point.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.float_pairs import pair_floats
from engine.kernels.launch import ORDINARY, overlap_options, settle_keys, wait_for_previous
from engine.kernels.quantized.words import PLANE, TILE_ROWS, TILE_WORDS, WordMatrix, scales_of

_BITS = (4, 8)
_ONE = 0x3F800000


@dataclass(frozen=True, slots=True)
class WordRowsConfig:
    """How the rows of a matrix are shared among programs.

    Attributes:
        block_n: rows (output features) of a program: 8, 16 or 32.
        num_warps: blocks of K that are loaded side by side.
        overlap: load the first words while the kernel before still runs; see engine/kernels/launch.py.
    """

    block_n: int
    num_warps: int = 8
    overlap: bool = False


@triton.jit
def _load_words(words_ptr, elements, first, BLOCKS: tl.constexpr):
    # Of eight rows, whose words in the first block begin at `words_ptr`: int32 [WARPS * 128].
    block = first + elements // 128
    addresses = words_ptr + block.to(tl.int64) * (TILE_ROWS * TILE_WORDS) + elements % 128
    return tl.load(addresses, mask=block < BLOCKS, other=0, eviction_policy="evict_first")


@triton.jit
def _load_groups(
    groups_ptr, threads, first, BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr
):
    # Scale and zero of each thread's row: int32 [WARPS * 32].
    group = threads * 0
    if GROUP:
        group = tl.minimum(first + threads // 32, BLOCKS - 1) * BLOCK_K // GROUP
    return tl.load(groups_ptr + group * TILE_ROWS + threads % 32 // 4)


@triton.jit
def _load_pair(
    x_ptr, elements, first, plane: tl.constexpr, dtype: tl.constexpr,
    K: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    # Two neighbours for each word, in fp32; zeros past K.
    block = first + elements // 128
    addresses = x_ptr + block * (BLOCK_K // 2) + plane * (PLANE // 2) + elements % 16
    if WHOLE:
        pair = tl.load(addresses, eviction_policy="evict_last")
    else:
        column = block * BLOCK_K + plane * PLANE + elements % 16 // 4 * 8  # of the thread's first word
        pair = tl.load(addresses, mask=column < K, other=0, eviction_policy="evict_last")
    return pair_floats(pair, dtype)


@triton.jit
def _thread_sums(values):
    # A thread's four values: [4 * threads] -> [threads].
    return tl.sum(tl.reshape(values, (values.shape[0] // 4, 4)), axis=1)


@triton.jit
def _number(words, one, bit: tl.constexpr, at: tl.constexpr, BITS: tl.constexpr):
    # 1 + n / 2 ** (23 - at), where n is the integer at this bit.
    moved = words << (at - bit) if bit < at else words >> (bit - at)
    return ((moved & (((1 << BITS) - 1) << at)) | one).to(tl.float32, bitcast=True)


@triton.jit
def _products(words, groups, one, tokens, upper_sum, lower_sum, BITS: tl.constexpr):
    # Words times the tokens of `_load_pair` for each plane, each thread's sum.
    # Of integers at bit 19 and at bit 15.
    upper = tl.zeros_like(tokens[0][0])
    lower = tl.zeros_like(tokens[0][0])
    for plane in tl.static_range(16 // BITS):
        if BITS == 4 and plane % 2 == 1:
            upper += tokens[plane][0] * _number(words, one, plane * BITS, 19, BITS)
            upper += tokens[plane][1] * _number(words, one, 16 + plane * BITS, 19, BITS)
        else:
            lower += tokens[plane][0] * _number(words, one, plane * BITS, 15, BITS)
            lower += tokens[plane][1] * _number(words, one, 16 + plane * BITS, 15, BITS)
    product = (_thread_sums(lower) - lower_sum) * 256
    if BITS == 4:
        product += (_thread_sums(upper) - upper_sum) * 16
    product -= (groups & 0xFF).to(tl.float32) * (upper_sum + lower_sum)
    return product * scales_of(groups, 0)


@triton.jit
def _store_rows(acc, bias_ptr, out_ptr, first_row, n, WARPS: tl.constexpr):
    # Of eight rows, by four threads of each warp.
    product = tl.sum(tl.sum(tl.reshape(acc, (WARPS, 8, 4)), axis=2), axis=0)
    rows = first_row + tl.arange(0, 8)
    if bias_ptr is not None:
        product += tl.load(bias_ptr + rows, mask=rows < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows, product.to(out_ptr.dtype.element_ty), mask=rows < n)


@triton.jit(do_not_specialize=["one"])
def word_rows_kernel(
    x_ptr,  # 16-bit floats [K], as int32
    words_ptr,  # int32 [tiles, BLOCKS, 128, 16]
    groups_ptr,  # int32 [tiles, GROUPS, 128]
    bias_ptr,  # [N] or None
    out_ptr,  # [N]
    n,
    one,  # 1.0 as int32; of a constant the compiler makes copies, an instruction for each number
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # inputs, whole blocks of K; 0 for one group
    ROWS: tl.constexpr,  # 8, 16 or 32
    WARPS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    BLOCK_K: tl.constexpr = 512 // BITS
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP else 1
    WHOLE: tl.constexpr = K % (BLOCK_K * WARPS) == 0
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS
    tile, within = row // TILE_ROWS, row % TILE_ROWS
    words_ptr += (tile.to(tl.int64) * BLOCKS * TILE_ROWS + within) * TILE_WORDS
    groups_ptr += tile * GROUPS * TILE_ROWS + within
    elements = tl.arange(0, WARPS * 128)
    threads = tl.arange(0, WARPS * 32)
    words0 = _load_words(words_ptr, elements, 0, BLOCKS)
    groups0 = _load_groups(groups_ptr, threads, 0, BLOCKS, BLOCK_K, GROUP)
    if ROWS >= 16:
        words1 = _load_words(words_ptr + 128, elements, 0, BLOCKS)
        groups1 = _load_groups(groups_ptr + 8, threads, 0, BLOCKS, BLOCK_K, GROUP)
    if ROWS == 32:
        words2 = _load_words(words_ptr + 256, elements, 0, BLOCKS)
        words3 = _load_words(words_ptr + 384, elements, 0, BLOCKS)
        groups2 = _load_groups(groups_ptr + 16, threads, 0, BLOCKS, BLOCK_K, GROUP)
        groups3 = _load_groups(groups_ptr + 24, threads, 0, BLOCKS, BLOCK_K, GROUP)
    wait_for_previous(OVERLAP)
    acc0 = tl.zeros((WARPS * 32,), dtype=tl.float32)
    acc1 = tl.zeros((WARPS * 32,), dtype=tl.float32)
    acc2 = tl.zeros((WARPS * 32,), dtype=tl.float32)
    acc3 = tl.zeros((WARPS * 32,), dtype=tl.float32)
    for first in range(0, BLOCKS, WARPS):
        pair0 = _load_pair(x_ptr, elements, first, 0, dtype, K, BLOCK_K, WHOLE)
        pair1 = _load_pair(x_ptr, elements, first, 1, dtype, K, BLOCK_K, WHOLE)
        if BITS == 4:
            pair2 = _load_pair(x_ptr, elements, first, 2, dtype, K, BLOCK_K, WHOLE)
            pair3 = _load_pair(x_ptr, elements, first, 3, dtype, K, BLOCK_K, WHOLE)
            tokens = (pair0, pair1, pair2, pair3)
            lower_sum = _thread_sums(pair0[0] + pair0[1] + (pair2[0] + pair2[1]))
            upper_sum = _thread_sums(pair1[0] + pair1[1] + (pair3[0] + pair3[1]))
        else:
            tokens = (pair0, pair1)
            lower_sum = _thread_sums(pair0[0] + pair0[1] + (pair1[0] + pair1[1]))
            upper_sum = lower_sum * 0
        following = _load_words(words_ptr, elements, first + WARPS, BLOCKS)
        acc0 += _products(words0, groups0, one, tokens, upper_sum, lower_sum, BITS)
        words0 = following
        groups0 = _load_groups(groups_ptr, threads, first + WARPS, BLOCKS, BLOCK_K, GROUP)
        if ROWS >= 16:
            following = _load_words(words_ptr + 128, elements, first + WARPS, BLOCKS)
            acc1 += _products(words1, groups1, one, tokens, upper_sum, lower_sum, BITS)
            words1 = following
            groups1 = _load_groups(groups_ptr + 8, threads, first + WARPS, BLOCKS, BLOCK_K, GROUP)
        if ROWS == 32:
            following = _load_words(words_ptr + 256, elements, first + WARPS, BLOCKS)
            acc2 += _products(words2, groups2, one, tokens, upper_sum, lower_sum, BITS)
            words2 = following
            groups2 = _load_groups(groups_ptr + 16, threads, first + WARPS, BLOCKS, BLOCK_K, GROUP)
            following = _load_words(words_ptr + 384, elements, first + WARPS, BLOCKS)
            acc3 += _products(words3, groups3, one, tokens, upper_sum, lower_sum, BITS)
            words3 = following
            groups3 = _load_groups(groups_ptr + 24, threads, first + WARPS, BLOCKS, BLOCK_K, GROUP)
    _store_rows(acc0, bias_ptr, out_ptr, row, n, WARPS)
    if ROWS >= 16:
        _store_rows(acc1, bias_ptr, out_ptr, row + 8, n, WARPS)
    if ROWS == 32:
        _store_rows(acc2, bias_ptr, out_ptr, row + 16, n, WARPS)
        _store_rows(acc3, bias_ptr, out_ptr, row + 24, n, WARPS)


settle_keys(_load_words, _load_groups, _load_pair, _thread_sums, _number, _products, _store_rows)


def fits_rows(matrix: WordMatrix) -> bool:
    """Whether `multiply_by_rows` can: integers of 4 or 8 bits, whose groups are whole blocks."""
    whole = matrix.is_one_group or matrix.group_size % matrix.block_k == 0
    return matrix.table is None and matrix.bits in _BITS and whole and matrix.fits_tiles


def multiply_by_rows(
    x: torch.Tensor, matrix: WordMatrix, bias: torch.Tensor | None = None, *, config: WordRowsConfig
) -> torch.Tensor:
    """x [1, K] times the matrix -> [1, N] in x's dtype.

    Args:
        x: of 16 bits, contiguous, aligned to 16 bytes.
        matrix: one that `fits_rows`.
        bias: [N].
    """
    assert x.shape == (1, matrix.k), f"x is {list(x.shape)}, not [1, {matrix.k}]"
    assert fits_rows(matrix)
    out = x.new_empty(1, matrix.n)
    word_rows_kernel[(triton.cdiv(matrix.n, config.block_n),)](
        x.view(torch.int32),
        matrix.words,
        matrix.groups,
        bias,
        out,
        matrix.n,
        _ONE,
        K=matrix.k,
        BITS=matrix.bits,
        GROUP=0 if matrix.is_one_group else matrix.group_size,
        ROWS=config.block_n,
        WARPS=config.num_warps,
        num_warps=config.num_warps,
        **(overlap_options() if config.overlap else ORDINARY),
    )
    return out
