"""Products of one to a few tokens with e4m3 weights, by plain multiply-adds.

As in linear/matrix_vector.py nothing but reading the weights matters: a program's threads lie side by side
along K, load 16 bytes of each of the program's rows at a time, and take sums over threads once at the end.
A thread adds its 16 products up at once, since as many sums for each row would leave no registers for
programs to run beside each other.

Inputs are quantized here, by every program: they are in the L1 cache, and a kernel of its own for that would
take longer than a product. They are the same numbers that `quantize` makes, so that a token's products are
near each other whichever kernel makes them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.fp8.e4m3 import rounded, scale_of, to_fp8
from engine.kernels.fp8.matrix import Fp8Matrix
from engine.kernels.launch import ORDINARY, overlap_options, settle_keys, wait_for_previous
from engine.kernels.linear.matrix_vector import MAX_TOKENS, RowsConfig

# Numbers of e4m3 that a thread loads at a time, the last dimension of tiles.
_LOADED = 16


@triton.jit
def _load_weights(w_ptr, rows, n, columns, K: tl.constexpr, ALIGNED: tl.constexpr):
    # Rows [1, BLOCK_N, ...] past the end are the last row again: that costs no mask, and is not stored.
    addresses = w_ptr + tl.minimum(rows, n - 1).to(tl.int64) * K + columns
    if ALIGNED:
        return tl.load(addresses, eviction_policy="evict_first")
    return tl.load(addresses, mask=columns < K, other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_tokens(x_ptr, tokens, stride, columns, M: tl.constexpr, K: tl.constexpr):
    # In fp32.
    mask = (tokens < M) & (columns < K)
    addresses = x_ptr + tokens.to(tl.int64) * stride + columns
    return tl.load(addresses, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)


@triton.jit
def _finish(product, bias_ptr, out_ptr, rows, tokens, n, out_stride, M: tl.constexpr):
    # product [BLOCK_M, BLOCK_N] -> out[tokens, rows]
    if bias_ptr is not None:
        product += tl.load(bias_ptr + rows, mask=rows < n, other=0.0)[None, :].to(tl.float32)
    addresses = out_ptr + tokens[:, None].to(tl.int64) * out_stride + rows[None, :]
    tl.store(
        addresses,
        product.to(out_ptr.dtype.element_ty),
        mask=(tokens[:, None] < M) & (rows[None, :] < n),
    )


@triton.jit
def channel_rows_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # e4m3 [N, K]
    w_scales_ptr,  # fp32 [N]
    static_ptr,  # fp32 [1], or None
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N]
    n,
    x_stride,
    out_stride,
    M: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,  # M rounded up to a power of two
    BLOCK_N: tl.constexpr,
    THREADS: tl.constexpr,  # side by side along K
    LOADED: tl.constexpr,  # by each
    QUANTIZED: tl.constexpr,  # whether inputs are
    OVERLAP: tl.constexpr,
):
    BLOCK_K: tl.constexpr = THREADS * LOADED
    ALIGNED: tl.constexpr = K % BLOCK_K == 0
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, BLOCK_M)
    within = tl.arange(0, LOADED)[None, None, None, :]
    columns = tl.arange(0, THREADS)[None, None, :, None] * LOADED + within
    # [1, BLOCK_N, THREADS, 16]: all four dimensions exist from the load on, since adding one later could move
    # data across threads.
    w = _load_weights(w_ptr, rows[None, :, None, None], n, columns, K, ALIGNED)
    w_scales = tl.load(w_scales_ptr + rows, mask=rows < n, other=0.0)
    wait_for_previous(OVERLAP)
    scales = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
    if QUANTIZED:
        if static_ptr is None:
            largest = tl.zeros((BLOCK_M, 1, THREADS), dtype=tl.float32)
            for k in range(0, K, BLOCK_K):
                x = _load_tokens(x_ptr, tokens[:, None, None, None], x_stride, k + columns, M, K)
                largest = tl.maximum(largest, tl.max(tl.abs(x), axis=3))
            scales = scale_of(tl.max(tl.reshape(largest, (BLOCK_M, THREADS)), axis=1))
        else:
            scales = tl.load(static_ptr) + tl.zeros((BLOCK_M,), dtype=tl.float32)
    x_scales = scales[:, None, None, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N, THREADS), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if k > 0:
            w = _load_weights(w_ptr, rows[None, :, None, None], n, k + columns, K, ALIGNED)
        x = _load_tokens(x_ptr, tokens[:, None, None, None], x_stride, k + columns, M, K)
        if QUANTIZED:
            x = rounded(x, x_scales) if static_ptr is None else to_fp8(x, x_scales).to(tl.float32)
        acc += tl.sum(x * w.to(tl.float32), axis=3)
    product = tl.sum(acc, axis=2) * scales[:, None] * w_scales[None, :]
    _finish(product, bias_ptr, out_ptr, rows, tokens, n, out_stride, M)


@triton.jit
def block_rows_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # e4m3 [N, K]
    w_scales_ptr,  # fp32 [ceil(N / OUTPUTS), ceil(K / INPUTS)]
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N]
    n,
    x_stride,
    out_stride,
    M: tl.constexpr,
    K: tl.constexpr,
    OUTPUTS: tl.constexpr,  # of a block of weights
    INPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # M rounded up to a power of two
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,  # groups of INPUTS at a time
    LOADED: tl.constexpr,  # numbers by each thread
    QUANTIZED: tl.constexpr,  # whether inputs are
    OVERLAP: tl.constexpr,
):
    NUM_GROUPS: tl.constexpr = (K + INPUTS - 1) // INPUTS
    ALIGNED: tl.constexpr = K % (BLOCK_G * INPUTS) == 0
    THREADS: tl.constexpr = INPUTS // LOADED  # of a group
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    own_rows = rows[None, :, None, None, None]
    tokens = tl.arange(0, BLOCK_M)
    own_tokens = tokens[:, None, None, None, None]
    groups = tl.arange(0, BLOCK_G)
    columns = tl.arange(0, THREADS)[None, None, None, :, None] * LOADED
    columns += groups[None, None, :, None, None] * INPUTS + tl.arange(0, LOADED)[None, None, None, None, :]
    w = _load_weights(w_ptr, own_rows, n, columns, K, ALIGNED)  # [1, BLOCK_N, BLOCK_G, THREADS, 16]
    scale_rows = tl.minimum(rows, n - 1) // OUTPUTS * NUM_GROUPS
    wait_for_previous(OVERLAP)
    acc = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_G, THREADS), dtype=tl.float32)
    for first in range(0, NUM_GROUPS, BLOCK_G):
        if first > 0:
            w = _load_weights(w_ptr, own_rows, n, first * INPUTS + columns, K, ALIGNED)
        own_groups = (first + groups)[None, None, :, None]
        scales = tl.load(
            w_scales_ptr + scale_rows[None, :, None, None] + own_groups,
            mask=own_groups < NUM_GROUPS,
            other=0.0,
        )  # [1, BLOCK_N, BLOCK_G, 1]
        x = _load_tokens(x_ptr, own_tokens, x_stride, first * INPUTS + columns, M, K)
        if QUANTIZED:
            largest = tl.max(tl.max(tl.abs(x), axis=4), axis=3, keep_dims=True)
            x_scales = scale_of(largest)  # [BLOCK_M, 1, BLOCK_G, 1]
            x = rounded(x, x_scales[:, :, :, :, None])
            scales = scales * x_scales
        acc += tl.sum(x * w.to(tl.float32), axis=4) * scales
    product = tl.sum(tl.sum(acc, axis=3), axis=2)
    _finish(product, bias_ptr, out_ptr, rows, tokens, n, out_stride, M)


settle_keys(_load_weights, _load_tokens, _finish)


def fp8_rows(
    x: torch.Tensor, matrix: Fp8Matrix, bias: torch.Tensor | None = None, *, config: RowsConfig
) -> torch.Tensor:
    """x @ w.T + bias for 1 to MAX_TOKENS tokens.

    Args:
        x: [M, K], last dimension contiguous.
        matrix: blocks of it have a power of two inputs, 16 at least.
        bias: [N].

    Returns:
        [M, N] in x's dtype.
    """
    (m, k), n = x.shape, matrix.codes.shape[0]
    assert 1 <= m <= MAX_TOKENS, f"{m} tokens, at most {MAX_TOKENS} are supported"
    assert matrix.codes.shape[1] == k, f"x has {k} features, the weights {matrix.codes.shape[1]}"
    assert x.stride(1) == 1
    assert matrix.codes.is_contiguous()
    out = x.new_empty(m, n)
    threads = 32 * config.num_warps
    sizes = {
        "M": m,
        "K": k,
        "BLOCK_M": triton.next_power_of_2(m),
        "BLOCK_N": config.block_n,
        "LOADED": _LOADED,
        "QUANTIZED": matrix.input_group > 0,
        "num_warps": config.num_warps,
        **(overlap_options() if config.overlap else ORDINARY),
    }
    grid = (triton.cdiv(n, config.block_n),)
    strides = n, x.stride(0), out.stride(0)
    if matrix.block is None:
        static = matrix.input_scale
        channel_rows_kernel[grid](
            x, matrix.codes, matrix.scales, static, bias, out, *strides, THREADS=threads, **sizes
        )
        return out
    outputs, inputs = matrix.block
    block_rows_kernel[grid](
        x,
        matrix.codes,
        matrix.scales,
        bias,
        out,
        *strides,
        OUTPUTS=outputs,
        INPUTS=inputs,
        BLOCK_G=max(1, threads * _LOADED // inputs),
        **sizes,
    )
    return out
