"""Products of any number of tokens with e4m3 weights, by tiles on the tensor cores.

The tensor memory accelerator copies tiles of both operands to shared memory some stages ahead. Hopper's
tensor cores add products of e4m3 with some 14 bits, so sums are kept on two levels, as in DeepSeek-V3
(arXiv:2412.19437): those of BLOCK_K inputs come from the tensor cores, and are added up in fp32, each
multiplied with its block's scales where there are blocks.

Work is shared among programs as in linear/tiled.py: whole tiles, where an element's value depends on its rows
of x and w alone, or equal shares of all tiles' blocks of K.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.kernels.fp8.matrix import Fp8Matrix
from engine.kernels.launch import ORDINARY, overlap_options, settle_keys, wait_for_previous
from engine.kernels.linear.tiled import (
    ShareWorkspace,
    TileConfig,
    gather_parts,
    prefetch_weights,
    whole_tile,
)

_GROUP_M = 8


@triton.jit
def _add_blocks(
    x_desc, w_desc, x_scales_ptr, w_scales_ptr, first_m, first_n, begin, end, m, n, k,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    # The blocks [begin, end) of K of the tile at (first_m, first_n). Outside the matrices, zeros are read.
    if TRANSPOSED:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    tokens = tl.minimum(first_m + tl.arange(0, BLOCK_M), m - 1)
    rows = tl.minimum(first_n + tl.arange(0, BLOCK_N), n - 1)
    for block in range(begin, end):
        x = x_desc.load([first_m, block * BLOCK_K])  # [BLOCK_M, BLOCK_K]
        w = w_desc.load([first_n, block * BLOCK_K])  # [BLOCK_N, BLOCK_K]
        if OUTPUTS > 0:
            group = block * BLOCK_K // INPUTS
            groups = tl.cdiv(k, INPUTS)
            x_scales = tl.load(x_scales_ptr + group * m + tokens)
            if OUTPUTS % BLOCK_N == 0:  # one of the weights' scales for all of the tile
                x_scales *= tl.load(w_scales_ptr + first_n // OUTPUTS * groups + group)
            else:
                w_scales = tl.load(w_scales_ptr + rows // OUTPUTS * groups + group)
        product = tl.dot(w, x.T) if TRANSPOSED else tl.dot(x, w.T)
        if OUTPUTS > 0:
            if TRANSPOSED:
                product *= x_scales[None, :]
                if OUTPUTS % BLOCK_N != 0:
                    product *= w_scales[:, None]
            else:
                product *= x_scales[:, None]
                if OUTPUTS % BLOCK_N != 0:
                    product *= w_scales[None, :]
        acc += product
    return acc


@triton.jit
def _store(
    acc, x_scales_ptr, w_scales_ptr, bias_ptr, out_ptr, first_m, first_n, m, n, out_stride,
    OUTPUTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    tokens = first_m + tl.arange(0, BLOCK_M)
    rows = first_n + tl.arange(0, BLOCK_N)
    if TRANSPOSED:
        acc = acc.T
    if OUTPUTS == 0:
        acc *= tl.load(x_scales_ptr + tokens, mask=tokens < m, other=0.0)[:, None]
        acc *= tl.load(w_scales_ptr + rows, mask=rows < n, other=0.0)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows, mask=rows < n, other=0.0)[None, :].to(tl.float32)
    addresses = out_ptr + tokens[:, None].to(tl.int64) * out_stride + rows[None, :]
    tl.store(addresses, acc.to(out_ptr.dtype.element_ty), mask=(tokens[:, None] < m) & (rows[None, :] < n))


@triton.jit(do_not_specialize=["m"])
def fp8_whole_tiles_kernel(
    x_desc,  # e4m3 [M, K], blocks of [BLOCK_M, BLOCK_K]
    w_desc,  # e4m3 [N, K], blocks of [BLOCK_N, BLOCK_K]
    w_ptr,  # the same [N, K]
    x_scales_ptr,  # fp32 [M], or [ceil(K / INPUTS), M]
    w_scales_ptr,  # fp32 [N], or [ceil(N / OUTPUTS), ceil(K / INPUTS)]
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N]
    m,
    n,
    k,
    out_stride,
    OUTPUTS: tl.constexpr,  # of a block of weights; 0 for a scale an output
    INPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PREFETCHED: tl.constexpr,  # blocks of K
    OVERLAP: tl.constexpr,
):
    first_m, first_n = whole_tile(m, n, BLOCK_M, BLOCK_N, GROUP_M)
    blocks = tl.cdiv(k, BLOCK_K)
    prefetch_weights(w_ptr, first_n, 0, tl.minimum(blocks, PREFETCHED), n, k, BLOCK_N, BLOCK_K, OVERLAP)
    wait_for_previous(OVERLAP)
    # fmt: off
    acc = _add_blocks(
        x_desc, w_desc, x_scales_ptr, w_scales_ptr, first_m, first_n, 0, blocks, m, n, k,
        OUTPUTS, INPUTS, BLOCK_M, BLOCK_N, BLOCK_K, TRANSPOSED,
    )
    _store(
        acc, x_scales_ptr, w_scales_ptr, bias_ptr, out_ptr, first_m, first_n, m, n, out_stride,
        OUTPUTS, BLOCK_M, BLOCK_N, TRANSPOSED,
    )
    # fmt: on


@triton.jit(do_not_specialize=["m"])
def fp8_shares_kernel(
    x_desc,  # e4m3 [M, K], blocks of [BLOCK_M, BLOCK_K]
    w_desc,  # e4m3 [N, K], blocks of [BLOCK_N, BLOCK_K]
    w_ptr,  # the same [N, K]
    x_scales_ptr,  # fp32 [M], or [ceil(K / INPUTS), M]
    w_scales_ptr,  # fp32 [N], or [ceil(N / OUTPUTS), ceil(K / INPUTS)]
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N]
    partials_ptr,  # fp32 [programs, 2, tile]
    arrivals_ptr,  # int32 [tiles], all zero, and zero again afterwards
    m,
    n,
    k,
    out_stride,
    OUTPUTS: tl.constexpr,  # of a block of weights; 0 for a scale an output
    INPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
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
    first_n = position // blocks // tiles_m * BLOCK_N
    prefetch_weights(w_ptr, first_n, begin, prefetched, n, k, BLOCK_N, BLOCK_K, OVERLAP)
    wait_for_previous(OVERLAP)
    while position < stop:
        tile = position // blocks
        begin = position - tile * blocks
        end = tl.minimum(blocks, begin + stop - position)
        position += end - begin
        # The tiles of tokens of the same weights are neighbours, so that the weights are read once.
        first_m = tile % tiles_m * BLOCK_M
        first_n = tile // tiles_m * BLOCK_N
        # fmt: off
        acc = _add_blocks(
            x_desc, w_desc, x_scales_ptr, w_scales_ptr, first_m, first_n, begin, end, m, n, k,
            OUTPUTS, INPUTS, BLOCK_M, BLOCK_N, BLOCK_K, TRANSPOSED,
        )
        # fmt: on
        acc, finished = gather_parts(
            acc,
            partials_ptr,
            arrivals_ptr,
            program,
            tile,
            begin,
            end,
            blocks,
            share,
            BLOCK_M,
            BLOCK_N,
            TRANSPOSED,
        )  # fmt: skip
        if finished:
            # fmt: off
            _store(
                acc, x_scales_ptr, w_scales_ptr, bias_ptr, out_ptr, first_m, first_n, m, n, out_stride,
                OUTPUTS, BLOCK_M, BLOCK_N, TRANSPOSED,
            )
            # fmt: on


settle_keys(_add_blocks, _store)


def fp8_tiles(
    codes: torch.Tensor,
    scales: torch.Tensor,
    matrix: Fp8Matrix,
    bias: torch.Tensor | None = None,
    *,
    dtype: torch.dtype,
    config: TileConfig,
    workspace: ShareWorkspace | None = None,
) -> torch.Tensor:
    """x @ w.T + bias with the given tiles.

    Args:
        codes, scales: x, as `quantize` makes it; K aligned to 16 bytes.
        matrix: a block of it has a multiple of `block_k` inputs.
        bias: [N].
        dtype: of the result.
        workspace: for a config with `programs`, large enough for it.

    Returns:
        [M, N].
    """
    (m, k), n = codes.shape, matrix.codes.shape[0]
    assert matrix.codes.shape[1] == k, f"x has {k} features, the weights {matrix.codes.shape[1]}"
    assert matrix.codes.is_contiguous()
    outputs, inputs = matrix.block or (0, config.block_k)
    assert inputs % config.block_k == 0
    out = scales.new_empty((m, n), dtype=dtype)
    x_desc = TensorDescriptor(codes, [m, k], [k, 1], [config.block_m, config.block_k])
    w_desc = TensorDescriptor(matrix.codes, [n, k], [k, 1], [config.block_n, config.block_k])
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    operands = (x_desc, w_desc, matrix.codes, scales, matrix.scales, bias, out)
    shape: dict[str, Any] = {
        "OUTPUTS": outputs,
        "INPUTS": inputs,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "TRANSPOSED": config.transposed,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # As many as the loop will have in flight.
        "PREFETCHED": config.num_stages,
        **(overlap_options() if config.overlap else ORDINARY),
    }
    if not config.programs:
        fp8_whole_tiles_kernel[(tiles,)](*operands, m, n, k, out.stride(0), GROUP_M=_GROUP_M, **shape)
        return out
    assert workspace is not None
    workspace.require(tiles, config.programs * config.block_m * config.block_n)
    fp8_shares_kernel[(config.programs,)](
        *operands, workspace.partials, workspace.arrivals, m, n, k, out.stride(0), **shape
    )
    return out
