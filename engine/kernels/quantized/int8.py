"""Tokens of 8 bits times weights of 8 bits, whose sums are exact integers: so it does not matter who adds
them up, and results are the same in any batch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.kernels.launch import ORDINARY, overlap_options, settle_keys, wait_for_previous
from engine.kernels.linear.tiled import ShareWorkspace, TileConfig, gather_parts

_BLOCK = 2048
_LARGEST = tl.constexpr(127.0)
_SMALLEST_SCALE = tl.constexpr(1e-10)
# Added and taken off again, it leaves the nearest integer, of two the even one.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def _load(x_row, first, K: tl.constexpr, BLOCK: tl.constexpr):
    columns = first + tl.arange(0, BLOCK)
    return tl.load(x_row + columns, mask=columns < K, other=0.0).to(tl.float32)


@triton.jit
def quantize_kernel(
    x_ptr,  # [M, K]
    scale_ptr,  # fp32 [1], or None for one of each token
    zero_ptr,  # int32 [1] or None
    codes_ptr,  # int8 [M, K]
    scales_ptr,  # fp32 [M]
    x_stride,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program quantizes a token."""
    token = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + token * x_stride
    wait_for_previous(OVERLAP)
    if scale_ptr is None:
        largest = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in tl.static_range(0, K, BLOCK):
            largest = tl.maximum(largest, tl.abs(_load(x_row, first, K, BLOCK)))
        scale = tl.maximum(tl.div_rn(tl.max(largest, axis=0), _LARGEST), _SMALLEST_SCALE)
    else:
        scale = tl.load(scale_ptr)
    tl.store(scales_ptr + token, scale)
    for first in tl.static_range(0, K, BLOCK):
        x = _load(x_row, first, K, BLOCK)
        # Far from what 8 bits hold rounding does not matter.
        whole = tl.minimum(tl.maximum(tl.div_rn(x, tl.zeros_like(x) + scale), -1e6), 1e6)
        whole = (whole + _ROUND) - _ROUND
        if zero_ptr is not None:
            whole += tl.load(zero_ptr).to(tl.float32)
        codes = tl.minimum(tl.maximum(whole, -128.0), _LARGEST).to(tl.int8)
        columns = first + tl.arange(0, BLOCK)
        tl.store(codes_ptr + token * K + columns, codes, mask=columns < K)


def quantize_tokens(
    x: torch.Tensor, scale: torch.Tensor | None = None, zero: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] -> int8 [M, K] and the scale of each token, fp32 [M].

    Args:
        scale: fp32 [1], of all; by default each token's largest magnitude over 127.
        zero: int32 [1], added.
    """
    m, k = x.shape
    codes, scales = x.new_empty(m, k, dtype=torch.int8), x.new_empty(m, dtype=torch.float32)
    quantize_kernel[(m,)](
        x,
        scale,
        zero,
        codes,
        scales,
        x.stride(0),
        K=k,
        BLOCK=min(_BLOCK, triton.next_power_of_2(k)),
        num_warps=8,
        **overlap_options(),
    )
    return codes, scales


@triton.jit
def _multiply(
    x_desc, w_desc, first_m, first_n, begin, end,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    # Blocks [begin, end) of K, of the tile at (first_m, first_n).
    if TRANSPOSED:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for block in range(begin, end):
        x = x_desc.load([first_m, block * BLOCK_K])
        w = w_desc.load([first_n, block * BLOCK_K])
        if TRANSPOSED:
            acc = tl.dot(w, x.T, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _store(
    acc, input_scales_ptr, scales_ptr, zero_ptr, sums_ptr, bias_ptr, out_ptr,
    first_m, first_n, m, n, out_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    tokens = first_m + tl.arange(0, BLOCK_M)
    rows = first_n + tl.arange(0, BLOCK_N)
    if TRANSPOSED:
        acc = acc.T
    if zero_ptr is not None:
        acc -= (tl.load(sums_ptr + rows, mask=rows < n, other=0) * tl.load(zero_ptr))[None, :]
    input_scales = tl.load(input_scales_ptr + tokens, mask=tokens < m, other=0.0)
    scales = tl.load(scales_ptr + rows, mask=rows < n, other=0.0)
    result = acc.to(tl.float32) * input_scales[:, None] * scales[None, :]
    if bias_ptr is not None:
        result += tl.load(bias_ptr + rows, mask=rows < n, other=0.0)[None, :].to(tl.float32)
    addresses = out_ptr + tokens[:, None].to(tl.int64) * out_stride + rows[None, :]
    mask = (tokens[:, None] < m) & (rows[None, :] < n)
    tl.store(addresses, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["m"])
def int8_kernel(
    x_desc,  # int8 [M, K], blocks of [BLOCK_M, BLOCK_K]
    w_desc,  # int8 [N, K], blocks of [BLOCK_N, BLOCK_K]
    input_scales_ptr,  # fp32 [M]
    scales_ptr,  # fp32 [N]
    zero_ptr,  # int32 [1] or None
    sums_ptr,  # int32 [N], of each output's weights; where there is a zero
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N]
    partials_ptr,  # int32 [programs, 2, tile]
    arrivals_ptr,  # int32 [tiles], all zero, and zero again afterwards
    m,
    n,
    k,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Equal shares of all tiles' blocks of K, as in linear/tiled.py; with a program a tile, whole tiles."""
    blocks = tl.cdiv(k, BLOCK_K)  # of K, in a tile
    tiles_m = tl.cdiv(m, BLOCK_M)
    total = tiles_m * tl.cdiv(n, BLOCK_N) * blocks
    share = tl.cdiv(total, tl.num_programs(0))
    program = tl.program_id(0)
    position = program * share
    stop = tl.minimum(position + share, total)
    wait_for_previous(OVERLAP)
    while position < stop:
        tile = position // blocks
        begin = position - tile * blocks
        end = tl.minimum(blocks, begin + stop - position)
        position += end - begin
        # The tiles of tokens of the same weights are neighbours, so that the weights are read once.
        first_m = tile % tiles_m * BLOCK_M
        first_n = tile // tiles_m * BLOCK_N
        acc = _multiply(x_desc, w_desc, first_m, first_n, begin, end, BLOCK_M, BLOCK_N, BLOCK_K, TRANSPOSED)
        acc, finished = gather_parts(
            acc, partials_ptr, arrivals_ptr, program, tile, begin, end, blocks, share,
            BLOCK_M, BLOCK_N, TRANSPOSED,
        )  # fmt: skip
        if finished:
            _store(
                acc, input_scales_ptr, scales_ptr, zero_ptr, sums_ptr, bias_ptr, out_ptr,
                first_m, first_n, m, n, out_stride, BLOCK_M, BLOCK_N, TRANSPOSED,
            )  # fmt: skip


settle_keys(_load, _multiply, _store)


def multiply_int8(
    codes: torch.Tensor,
    input_scales: torch.Tensor,
    w: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    zero: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
    config: TileConfig,
    workspace: ShareWorkspace,
) -> torch.Tensor:
    """int8 codes [M, K] times int8 w [N, K] -> [M, N].

    Args:
        codes, w: contiguous, K aligned to 16.
        input_scales: fp32 [M]. scales: fp32 [N].
        bias: [N].
        dtype: of the result.
        zero: int32 [1], by which codes are too large; then `sums`, int32 [N], are those of each output's w.
        config: 0 programs for whole tiles.
        workspace: large enough for the config.
    """
    (m, k), n = codes.shape, w.shape[0]
    out = codes.new_empty(m, n, dtype=dtype)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    if config.programs:
        workspace.require(tiles, config.programs * config.block_m * config.block_n)
    int8_kernel[(config.programs or tiles,)](
        TensorDescriptor(codes, [m, k], [k, 1], [config.block_m, config.block_k]),
        TensorDescriptor(w, [n, k], [k, 1], [config.block_n, config.block_k]),
        input_scales,
        scales,
        zero,
        sums,
        bias,
        out,
        workspace.partials.view(torch.int32),
        workspace.arrivals,
        m,
        n,
        k,
        out.stride(0),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        TRANSPOSED=config.transposed,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **(overlap_options() if config.overlap else ORDINARY),
    )
    return out
