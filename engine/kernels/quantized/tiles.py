"""Products of tokens with weights in tiles of words, on the tensor cores.

The weights are the first operand, whose rows come in steps of 64 and which may be in registers, where words
become numbers. The tokens are the second; the tensor memory accelerator copies them to shared memory. Sums
over a group of inputs are scaled in fp32 and added up. Work is shared among programs in one of the two ways
of linear/tiled.py: whole tiles of the output, or equal shares of all tiles' blocks of K, whose parts are
added in the order of K by the program that finishes last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.kernels.launch import ORDINARY, overlap_options, prefetch_lines, settle_keys, wait_for_previous
from engine.kernels.linear.tiled import ShareWorkspace, gather_parts, whole_tile
from engine.kernels.quantized.words import (
    TILE_WORDS,
    WordMatrix,
    first_word_row,
    group_addresses,
    load_groups,
    scales_of,
    table_rows,
    values_of,
)
from engine.kernels.tensor_cores import settled

_GROUP_M = 8


@dataclass(frozen=True, slots=True)
class WordConfig:
    """The tile of a program and how it is worked on.

    Attributes:
        block_m: tokens of a tile, 8 or more.
        block_n: outputs of a tile: 32, 64 or 128.
        num_warps: 4, or 8 for 128 outputs; with fewer, each warp multiplies 32 outputs on its own.
        num_stages: blocks of K in flight.
        programs: 0 for whole tiles; otherwise this many take equal shares.
        overlap: have the first weights on their way to the L2 cache while the kernel before still runs; see
            engine/kernels/launch.py.
    """

    block_m: int
    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 4
    programs: int = 0
    overlap: bool = False


@triton.jit
def _prefetch(words_ptr, first_n, begin, end, blocks, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr):
    # Blocks [begin, end) of K, of BLOCK_N outputs. A line of the cache is 32 words.
    if OVERLAP:
        lines = tl.arange(0, BLOCK_N * TILE_WORDS // 32) * 32
        for block in range(begin, end):
            first = first_word_row(first_n, block, blocks).to(tl.int64) * TILE_WORDS
            prefetch_lines(words_ptr + first + lines, lines >= 0, OVERLAP)


@triton.jit
def multiply_words(
    x_desc, words_desc, groups_ptr, table_ptr, first_m, first_n, begin, end, n, k,
    dtype: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, TABLES: tl.constexpr, SCALED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Blocks [begin, end) of K, of the tile at (first_m, first_n), [BLOCK_N, BLOCK_M] in fp32."""
    blocks = tl.cdiv(k, BLOCK_K)
    num_groups = 1
    if GROUP:
        num_groups = tl.cdiv(k, GROUP)
    tables = first_n
    if TABLES:
        tables = table_rows(table_ptr, first_n, n, TABLES, BLOCK_N)
    addresses = group_addresses(groups_ptr, first_n, num_groups, BLOCK_N)
    groups = load_groups(addresses, begin, num_groups, GROUP, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for block in range(begin, end):
        words = words_desc.load([first_word_row(first_n, block, blocks), 0])
        x = x_desc.load([first_m, block * BLOCK_K])  # [BLOCK_M, BLOCK_K]; what is past K is zero
        if GROUP:
            # The next block's are on their way while this one's are used.
            next_groups = load_groups(addresses, block + 1, num_groups, GROUP, BLOCK_K)
        w = values_of(words, groups, tables, dtype, BLOCK_N, BLOCK_K, BITS, TABLES, SCALED, PACKED)
        if SCALED or not GROUP:
            acc = settled(tl.dot(w, x.T, acc))
        else:
            acc += tl.dot(w, x.T) * scales_of(groups, TABLES)
        if GROUP:
            groups = next_groups
    if not GROUP:
        acc *= scales_of(groups, TABLES)
    return acc


@triton.jit
def _store(
    acc, bias_ptr, out_ptr, first_m, first_n, m, n, out_stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    tokens = first_m + tl.arange(0, BLOCK_M)
    rows = first_n + tl.arange(0, BLOCK_N)
    acc = acc.T
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows, mask=rows < n, other=0.0)[None, :].to(tl.float32)
    addresses = out_ptr + tokens[:, None].to(tl.int64) * out_stride + rows[None, :]
    tl.store(addresses, acc.to(out_ptr.dtype.element_ty), mask=(tokens[:, None] < m) & (rows[None, :] < n))


@triton.jit(do_not_specialize=["m"])
def whole_words_kernel(
    x_desc,  # [M, K], blocks of [BLOCK_M, BLOCK_K]
    words_desc,  # int32 [tiles * blocks * 128, 16], blocks of [BLOCK_N, 16]
    words_ptr,  # the same
    groups_ptr,  # int32 [tiles, G, 128]
    table_ptr,  # [1 or N, 16] or None
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N]
    m,
    n,
    k,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TABLES: tl.constexpr,
    SCALED: tl.constexpr,  # whether scales are multiplied into weights, or into sums
    PACKED: tl.constexpr,
    PREFETCHED: tl.constexpr,  # blocks of K
    OVERLAP: tl.constexpr,
):
    first_m, first_n = whole_tile(m, n, BLOCK_M, BLOCK_N, GROUP_M)
    blocks = tl.cdiv(k, BLOCK_K)
    _prefetch(words_ptr, first_n, 0, tl.minimum(blocks, PREFETCHED), blocks, BLOCK_N, OVERLAP)
    wait_for_previous(OVERLAP)
    acc = multiply_words(
        x_desc, words_desc, groups_ptr, table_ptr, first_m, first_n, 0, blocks, n, k,
        out_ptr.dtype.element_ty, BLOCK_M, BLOCK_N, BLOCK_K, BITS, GROUP, TABLES, SCALED, PACKED,
    )  # fmt: skip
    _store(acc, bias_ptr, out_ptr, first_m, first_n, m, n, out_stride, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["m"])
def shared_words_kernel(
    x_desc,  # [M, K], blocks of [BLOCK_M, BLOCK_K]
    words_desc,  # int32 [tiles * blocks * 128, 16], blocks of [BLOCK_N, 16]
    words_ptr,  # the same
    groups_ptr,  # int32 [tiles, G, 128]
    table_ptr,  # [1 or N, 16] or None
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N]
    partials_ptr,  # fp32 [programs, 2, tile]
    arrivals_ptr,  # int32 [tiles], all zero, and zero again afterwards
    m,
    n,
    k,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TABLES: tl.constexpr,
    SCALED: tl.constexpr,  # whether scales are multiplied into weights, or into sums
    PACKED: tl.constexpr,
    PREFETCHED: tl.constexpr,  # blocks of K
    OVERLAP: tl.constexpr,
):
    blocks = tl.cdiv(k, BLOCK_K)  # of K, in a tile
    tiles_m = tl.cdiv(m, BLOCK_M)
    total = tiles_m * tl.cdiv(n, BLOCK_N) * blocks
    share = tl.cdiv(total, tl.num_programs(0))
    program = tl.program_id(0)
    position = program * share
    stop = tl.minimum(position + share, total)
    begin = position % blocks
    prefetched = tl.minimum(begin + tl.minimum(stop - position, PREFETCHED), blocks)
    _prefetch(words_ptr, position // blocks // tiles_m * BLOCK_N, begin, prefetched, blocks, BLOCK_N, OVERLAP)
    wait_for_previous(OVERLAP)
    while position < stop:
        tile = position // blocks
        begin = position - tile * blocks
        end = tl.minimum(blocks, begin + stop - position)
        position += end - begin
        # The tiles of tokens of the same weights are neighbours, so that the weights are read once.
        first_m = tile % tiles_m * BLOCK_M
        first_n = tile // tiles_m * BLOCK_N
        acc = multiply_words(
            x_desc, words_desc, groups_ptr, table_ptr, first_m, first_n, begin, end, n, k,
            out_ptr.dtype.element_ty, BLOCK_M, BLOCK_N, BLOCK_K, BITS, GROUP, TABLES, SCALED, PACKED,
        )  # fmt: skip
        acc, finished = gather_parts(
            acc, partials_ptr, arrivals_ptr, program, tile, begin, end, blocks, share,
            BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
        if finished:
            _store(acc, bias_ptr, out_ptr, first_m, first_n, m, n, out_stride, BLOCK_M, BLOCK_N)


settle_keys(_prefetch, multiply_words, _store)


def multiply_by_words(
    x: torch.Tensor,
    matrix: WordMatrix,
    bias: torch.Tensor | None = None,
    *,
    config: WordConfig,
    workspace: ShareWorkspace | None = None,
) -> torch.Tensor:
    """x [M, K] times the matrix -> [M, N].

    Args:
        x: of 16 bits, last dimension contiguous, rows and start aligned to 16 bytes.
        matrix: one that `fits_tiles`.
        bias: [N].
        workspace: for a config with `programs`, large enough for it.

    Returns:
        [M, N] in x's dtype.
    """
    (m, k), n = x.shape, matrix.n
    assert k == matrix.k, f"x has {k} features, the weights {matrix.k}"
    assert matrix.fits_tiles
    out = x.new_empty(m, n)
    x_desc = TensorDescriptor(x, [m, k], list(x.stride()), [config.block_m, matrix.block_k])
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    operands = (
        x_desc,
        matrix.descriptor(config.block_n),
        matrix.words,
        matrix.groups,
        matrix.table,
        bias,
        out,
    )
    sizes = (m, n, k, out.stride(0))
    num_stages = matrix.stages(config.block_m, config.block_n, config.num_stages)
    constants = {
        **matrix.constants,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "SCALED": matrix.scales_weights(config.block_m),
        "num_warps": config.num_warps,
        "num_stages": num_stages,
        # As many as the loop will have in flight.
        "PREFETCHED": num_stages,
        **(overlap_options() if config.overlap else ORDINARY),
    }
    if not config.programs:
        whole_words_kernel[(tiles,)](*operands, *sizes, GROUP_M=_GROUP_M, **constants)
        return out
    assert workspace is not None
    workspace.require(tiles, config.programs * config.block_m * config.block_n)
    shared_words_kernel[(config.programs,)](
        *operands, workspace.partials, workspace.arrivals, *sizes, **constants
    )
    return out
