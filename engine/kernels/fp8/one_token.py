"""Products of one token with e4m3 weights whose scales are of outputs, by plain multiply-adds.

A program's threads lie side by side along K. Each loads 16 bytes of each of the program's rows before the
token is there, and more while it multiplies; nothing moves between threads until the sums over them are taken
at the end. Two instructions make four 16-bit floats of four numbers of e4m3, which are exact. Copies through
shared memory, some loads ahead, were measured to be several times slower.

Inputs are quantized by every program: they are in the L1 cache, and a launch of its own for that would take
longer than a product. They are the same numbers that `quantize` makes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.float_pairs import pair_floats
from engine.kernels.fp8.e4m3 import rounded, scale_of, to_fp8
from engine.kernels.fp8.matrix import Fp8Matrix
from engine.kernels.launch import ORDINARY, overlap_options, settle_keys, wait_for_previous

# Numbers of e4m3 that a thread loads at a time.
_LOADED = tl.constexpr(16)


@dataclass(frozen=True, slots=True)
class OneTokenConfig:
    """How the rows of a matrix are shared among programs.

    Attributes:
        block_n: rows (output features) of a program, 2 or 4.
        num_warps: 32 * num_warps threads load 16 numbers of each row at a time.
        overlap: load the first weights while the kernel before still runs; see engine/kernels/launch.py.
    """

    block_n: int
    num_warps: int = 4
    overlap: bool = False


@triton.jit
def _halves(quads):
    # [THREADS, 4] -> the first two and the last two of each thread, [THREADS, 2] each.
    return tl.split(tl.trans(tl.reshape(quads, (quads.shape[0], 2, 2)), 0, 2, 1))


@triton.jit
def _alternate(quads):
    # [THREADS, 4] -> each thread's first and third, and its second and fourth.
    return tl.split(tl.reshape(quads, (quads.shape[0], 2, 2)))


@triton.jit
def _load_pairs(x_ptr, threads, first, half: tl.constexpr, K: tl.constexpr):
    # Eight of each thread's 16 inputs, as int32 [THREADS, 4] that hold two each; zeros past K.
    column = (first + threads) * _LOADED + half * 8
    return tl.load(
        x_ptr + (column // 2)[:, None] + tl.arange(0, 4)[None, :],
        mask=(column < K)[:, None],
        other=0,
        eviction_policy="evict_last",
    )


@triton.jit
def _load_row(w_ptr, row, threads, first, K: tl.constexpr):
    # 16 weights of a row for each thread, as int32 [THREADS, 4]; zeros past K.
    chunk = first + threads
    addresses = w_ptr + row.to(tl.int64) * (K // 4) + chunk[:, None] * 4 + tl.arange(0, 4)[None, :]
    mask = (chunk < K // _LOADED)[:, None]
    return tl.load(addresses, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def _numbers(words, PACKED: tl.constexpr):
    # Four numbers of e4m3 in each word -> fp32.
    if PACKED:
        n0, n1, n2, n3 = tl.inline_asm_elementwise(
            "{ .reg .b16 low, high, a, b, c, d; .reg .b32 first, second; mov.b32 {low, high}, $4;"
            " cvt.rn.f16x2.e4m3x2 first, low; cvt.rn.f16x2.e4m3x2 second, high;"
            " mov.b32 {a, b}, first; mov.b32 {c, d}, second;"
            " cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; cvt.f32.f16 $2, c; cvt.f32.f16 $3, d; }",
            "=f,=f,=f,=f,r",
            [words],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        n0 = (words & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        n1 = ((words >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        n2 = ((words >> 16) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        n3 = ((words >> 24) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return n0, n1, n2, n3


@triton.jit
def _quad(pairs, scale, dtype: tl.constexpr, QUANTIZED: tl.constexpr, STATIC: tl.constexpr):
    # [THREADS, 4] pairs -> eight inputs as four [THREADS, 2], by their place in a word of weights.
    even, odd = _alternate(pairs)
    x0, x1 = pair_floats(even, dtype)
    x2, x3 = pair_floats(odd, dtype)
    if QUANTIZED:
        if STATIC:
            x0 = to_fp8(x0, scale).to(tl.float32)
            x1 = to_fp8(x1, scale).to(tl.float32)
            x2 = to_fp8(x2, scale).to(tl.float32)
            x3 = to_fp8(x3, scale).to(tl.float32)
        else:
            x0 = rounded(x0, scale)
            x1 = rounded(x1, scale)
            x2 = rounded(x2, scale)
            x3 = rounded(x3, scale)
    return x0, x1, x2, x3


@triton.jit
def _product(words, first_x, last_x, PACKED: tl.constexpr):
    # A row's weights times the inputs, [THREADS].
    first, last = _halves(words)
    a0, a1, a2, a3 = _numbers(first, PACKED)
    acc = a0 * first_x[0] + a1 * first_x[1] + a2 * first_x[2] + a3 * first_x[3]
    b0, b1, b2, b3 = _numbers(last, PACKED)
    acc += b0 * last_x[0]
    acc += b1 * last_x[1]
    acc += b2 * last_x[2]
    acc += b3 * last_x[3]
    return tl.sum(acc, axis=1)


@triton.jit
def _store_row(acc, scale, w_scales_ptr, bias_ptr, out_ptr, row, n):
    product = tl.sum(acc, axis=0) * scale
    if row < n:
        product *= tl.load(w_scales_ptr + row)
        if bias_ptr is not None:
            product += tl.load(bias_ptr + row).to(tl.float32)
        tl.store(out_ptr + row, product.to(out_ptr.dtype.element_ty))


@triton.jit
def one_token_kernel(
    x_ptr,  # 16-bit floats [K], as int32
    w_ptr,  # e4m3 [N, K], as int32
    w_scales_ptr,  # fp32 [N]
    static_ptr,  # fp32 [1], or None
    bias_ptr,  # [N] or None
    out_ptr,  # [N]
    n,
    K: tl.constexpr,
    ROWS: tl.constexpr,  # 2 or 4
    THREADS: tl.constexpr,
    QUANTIZED: tl.constexpr,  # whether inputs are
    PACKED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    CHUNKS: tl.constexpr = K // _LOADED
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    STATIC: tl.constexpr = static_ptr is not None
    row = tl.program_id(0) * ROWS
    row1 = tl.minimum(row + 1, n - 1)
    row2 = tl.minimum(row + 2, n - 1)
    row3 = tl.minimum(row + 3, n - 1)
    threads = tl.arange(0, THREADS)
    # The first weights need not wait for the tokens.
    words0 = _load_row(w_ptr, row, threads, 0, K)
    words1 = _load_row(w_ptr, row1, threads, 0, K)
    if ROWS == 4:
        words2 = _load_row(w_ptr, row2, threads, 0, K)
        words3 = _load_row(w_ptr, row3, threads, 0, K)
    wait_for_previous(OVERLAP)
    scale = 1.0
    if QUANTIZED:
        if STATIC:
            scale = tl.load(static_ptr)
        else:
            largest = tl.zeros((THREADS,), dtype=tl.float32)
            for first in range(0, CHUNKS, THREADS):
                for half in tl.static_range(2):
                    low, high = pair_floats(_load_pairs(x_ptr, threads, first, half, K), dtype)
                    largest = tl.maximum(largest, tl.max(tl.maximum(tl.abs(low), tl.abs(high)), axis=1))
            scale = scale_of(tl.max(largest, axis=0))
    acc0 = tl.zeros((THREADS,), dtype=tl.float32)
    acc1 = tl.zeros((THREADS,), dtype=tl.float32)
    acc2 = tl.zeros((THREADS,), dtype=tl.float32)
    acc3 = tl.zeros((THREADS,), dtype=tl.float32)
    for first in range(0, CHUNKS, THREADS):
        next0 = _load_row(w_ptr, row, threads, first + THREADS, K)
        next1 = _load_row(w_ptr, row1, threads, first + THREADS, K)
        if ROWS == 4:
            next2 = _load_row(w_ptr, row2, threads, first + THREADS, K)
            next3 = _load_row(w_ptr, row3, threads, first + THREADS, K)
        first_x = _quad(_load_pairs(x_ptr, threads, first, 0, K), scale, dtype, QUANTIZED, STATIC)
        last_x = _quad(_load_pairs(x_ptr, threads, first, 1, K), scale, dtype, QUANTIZED, STATIC)
        acc0 += _product(words0, first_x, last_x, PACKED)
        acc1 += _product(words1, first_x, last_x, PACKED)
        words0, words1 = next0, next1
        if ROWS == 4:
            acc2 += _product(words2, first_x, last_x, PACKED)
            acc3 += _product(words3, first_x, last_x, PACKED)
            words2, words3 = next2, next3
    _store_row(acc0, scale, w_scales_ptr, bias_ptr, out_ptr, row, n)
    _store_row(acc1, scale, w_scales_ptr, bias_ptr, out_ptr, row + 1, n)
    if ROWS == 4:
        _store_row(acc2, scale, w_scales_ptr, bias_ptr, out_ptr, row + 2, n)
        _store_row(acc3, scale, w_scales_ptr, bias_ptr, out_ptr, row + 3, n)


settle_keys(_halves, _alternate, _load_pairs, _load_row, _numbers, _quad, _product, _store_row)


def fp8_one_token(
    x: torch.Tensor, matrix: Fp8Matrix, bias: torch.Tensor | None = None, *, config: OneTokenConfig
) -> torch.Tensor:
    """x [1, K] @ w.T + bias -> [1, N] in x's dtype.

    Args:
        x: of 16 bits, contiguous, aligned to 16 bytes.
        matrix: with scales of outputs; K is a multiple of 16.
        bias: [N].
    """
    n, k = matrix.codes.shape
    assert x.shape == (1, k), f"x is {list(x.shape)}, not [1, {k}]"
    assert matrix.block is None
    assert k % 16 == 0
    out = x.new_empty(1, n)
    one_token_kernel[(triton.cdiv(n, config.block_n),)](
        x.view(torch.int32),
        matrix.codes.view(torch.int32),
        matrix.scales,
        matrix.input_scale,
        bias,
        out,
        n,
        K=k,
        ROWS=config.block_n,
        THREADS=32 * config.num_warps,
        QUANTIZED=matrix.input_group > 0,
        PACKED=not triton.knobs.runtime.interpret,
        num_warps=config.num_warps,
        **(overlap_options() if config.overlap else ORDINARY),
    )
    return out
