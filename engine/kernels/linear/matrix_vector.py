"""Products of one to a few tokens with a weight matrix, by plain multiply-adds.

They are bound by reading the weights once, so nothing but the loads matters: a program's threads lie side by
side along K, each loads 16 bytes of every one of the program's rows at a time, straight into registers, and
the sums over threads are taken once at the end. Tensor cores would want the weights in shared memory first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.launch import ORDINARY, overlap_options, wait_for_previous

# Each token costs a multiply-add per weight: past this the arithmetic, not the memory, is the limit.
MAX_TOKENS = 8


@dataclass(frozen=True, slots=True)
class RowsConfig:
    """How the rows of a weight matrix are shared among programs.

    Attributes:
        block_n: rows (output features) of a program.
        num_warps: 32 * num_warps threads load 8 weights of a row each at a time.
        unroll: this many of such loads of each row are in flight together.
        overlap: load the first weights while the kernel before still runs; see engine/kernels/launch.py.
    """

    block_n: int
    num_warps: int = 4
    unroll: int = 1
    overlap: bool = False

    @property
    def block_k(self) -> int:
        """Weights of a row that are loaded together."""
        return 8 * 32 * self.num_warps * self.unroll

    def options(self, m: int) -> dict[str, int | bool]:
        """What all the kernels are launched with."""
        return {
            "BLOCK_M": triton.next_power_of_2(m),
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            **(overlap_options() if self.overlap else ORDINARY),
        }


@triton.jit
def _finish(acc, bias_ptr, out_ptr, rows, tokens, n, out_stride, M: tl.constexpr, HAS_BIAS: tl.constexpr):
    # acc [BLOCK_M, BLOCK_N, BLOCK_K] -> out[tokens, rows]
    product = tl.sum(acc, axis=2)  # [BLOCK_M, BLOCK_N]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + rows, mask=rows < n, other=0.0)
        product += bias[None, :].to(tl.float32)
    addresses = out_ptr + tokens[:, None].to(tl.int64) * out_stride + rows[None, :]
    tl.store(
        addresses,
        product.to(out_ptr.dtype.element_ty),
        mask=(tokens[:, None] < M) & (rows[None, :] < n),
    )


@triton.jit
def _load_weights(w_ptr, rows, n, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    # [1, BLOCK_N, BLOCK_K]. Rows past the end are the last row again: that costs no mask, and is not
    # stored. All three dimensions exist from the load on: adding one later could move data across threads.
    columns = k + tl.arange(0, BLOCK_K)[None, None, :]
    clamped = tl.minimum(rows, n - 1).to(tl.int64)
    addresses = w_ptr + clamped[None, :, None] * K + columns
    if K % BLOCK_K == 0:
        return tl.load(addresses, eviction_policy="evict_first")
    return tl.load(addresses, mask=columns < K, other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_tokens(x_ptr, tokens, stride, k, M: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    # [BLOCK_M, 1, BLOCK_K] in fp32
    columns = k + tl.arange(0, BLOCK_K)[None, None, :]
    addresses = x_ptr + tokens[:, None, None].to(tl.int64) * stride + columns
    mask = (tokens[:, None, None] < M) & (columns < K)
    return tl.load(addresses, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)


@triton.jit
def matrix_vector_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N]
    n,
    x_stride,
    out_stride,
    M: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,  # M rounded up to a power of two
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K), dtype=tl.float32)
    w = _load_weights(w_ptr, rows, n, 0, K, BLOCK_K)
    wait_for_previous(OVERLAP)
    for k in range(0, K, BLOCK_K):
        if k > 0:
            w = _load_weights(w_ptr, rows, n, k, K, BLOCK_K)
        x = _load_tokens(x_ptr, tokens, x_stride, k, M, K, BLOCK_K)
        acc += x * w.to(tl.float32)
    _finish(acc, bias_ptr, out_ptr, rows, tokens, n, out_stride, M, HAS_BIAS)


@triton.jit
def norm_matrix_vector_kernel(
    x_ptr,  # [M, K]
    residual_ptr,  # [M, K]
    norm_weight_ptr,  # [K]
    w_ptr,  # [N, K]
    residual_out_ptr,  # [M, K]
    out_ptr,  # [M, N]
    n,
    x_stride,
    residual_stride,
    residual_out_stride,
    out_stride,
    eps,
    M: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # 1 / rms is one number a token, so it multiplies the finished product, and one pass is enough.
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M, 1, BLOCK_K), dtype=tl.float32)
    w = _load_weights(w_ptr, rows, n, 0, K, BLOCK_K)
    wait_for_previous(OVERLAP)
    for k in range(0, K, BLOCK_K):
        if k > 0:
            w = _load_weights(w_ptr, rows, n, k, K, BLOCK_K)
        columns = k + tl.arange(0, BLOCK_K)[None, None, :]
        x = _load_tokens(x_ptr, tokens, x_stride, k, M, K, BLOCK_K)
        residual = _load_tokens(residual_ptr, tokens, residual_stride, k, M, K, BLOCK_K)
        total = (x + residual).to(residual_out_ptr.dtype.element_ty)
        if tl.program_id(0) == 0:
            addresses = residual_out_ptr + tokens[:, None, None].to(tl.int64) * residual_out_stride + columns
            tl.store(addresses, total, mask=(tokens[:, None, None] < M) & (columns < K))
        norm_weight = tl.load(norm_weight_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
        exact = total.to(tl.float32)
        squares += exact * exact
        acc += exact * norm_weight * w.to(tl.float32)
    acc *= tl.rsqrt(tl.sum(squares, axis=2, keep_dims=True) / K + eps)
    _finish(acc, None, out_ptr, rows, tokens, n, out_stride, M, False)


@triton.jit
def silu_mul_matrix_vector_kernel(
    gate_up_ptr,  # [M, 2 * K]
    w_ptr,  # [N, K]
    out_ptr,  # [M, N]
    n,
    gate_up_stride,
    out_stride,
    M: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K), dtype=tl.float32)
    w = _load_weights(w_ptr, rows, n, 0, K, BLOCK_K)
    wait_for_previous(OVERLAP)
    for k in range(0, K, BLOCK_K):
        if k > 0:
            w = _load_weights(w_ptr, rows, n, k, K, BLOCK_K)
        gate = _load_tokens(gate_up_ptr, tokens, gate_up_stride, k, M, K, BLOCK_K)
        up = _load_tokens(gate_up_ptr + K, tokens, gate_up_stride, k, M, K, BLOCK_K)
        x = gate * up / (1.0 + tl.exp(-gate))
        acc += x * w.to(tl.float32)
    _finish(acc, None, out_ptr, rows, tokens, n, out_stride, M, False)


def default_rows(m: int, n: int) -> RowsConfig:
    """Few enough rows a program that the programs fill the chip, and that m sums of each fit in registers."""
    most = max(1, 4 // triton.next_power_of_2(m)) if m > 1 else 4
    fill = 4 if n >= 8192 else 2 if n >= 2048 else 1
    return RowsConfig(block_n=min(most, fill))


def matrix_vector(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    config: RowsConfig | None = None,
) -> torch.Tensor:
    """x @ w.T + bias for 1 to MAX_TOKENS tokens.

    Args:
        x: [M, K], last dimension contiguous.
        w: [N, K], contiguous.
        bias: [N].
        out: [M, N], written if given, last dimension contiguous.
        config: measured or tried by the caller; by default a plausible one.

    Returns:
        [M, N] in x's dtype.
    """
    m, k, n = _check(x, w, w.shape[1])
    config = config or default_rows(m, n)
    if out is None:
        out = x.new_empty(m, n)
    matrix_vector_kernel[(triton.cdiv(n, config.block_n),)](
        x,
        w,
        bias,
        out,
        n,
        x.stride(0),
        out.stride(0),
        M=m,
        K=k,
        HAS_BIAS=bias is not None,
        **config.options(m),
    )
    return out


def norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    w: torch.Tensor,
    *,
    residual_out: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: RowsConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """rms_norm(x + residual) * norm_weight, times w, in one launch, for 1 to MAX_TOKENS tokens.

    Every program normalises again, which costs it three vectors from the cache. The normalised tokens are not
    rounded on the way to the product, so the result is closer to exact than that of separate kernels.

    Args:
        x, residual: [M, K], last dimension contiguous.
        norm_weight: [K].
        w: [N, K], contiguous.
        residual_out: [M, K]; must share no memory with x or residual, which other programs still read.

    Returns:
        (product [M, N], x + residual [M, K]), in x's dtype.
    """
    m, k, n = _check(x, w, w.shape[1])
    config = config or default_rows(m, n)
    if residual_out is None:
        residual_out = x.new_empty(m, k)
    if out is None:
        out = x.new_empty(m, n)
    norm_matrix_vector_kernel[(triton.cdiv(n, config.block_n),)](
        x,
        residual,
        norm_weight,
        w,
        residual_out,
        out,
        n,
        x.stride(0),
        residual.stride(0),
        residual_out.stride(0),
        out.stride(0),
        eps,
        M=m,
        K=k,
        **config.options(m),
    )
    return out, residual_out


def silu_mul_linear(
    gate_up: torch.Tensor,
    w: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    config: RowsConfig | None = None,
) -> torch.Tensor:
    """(silu(gate) * up) times w in one launch, for 1 to MAX_TOKENS tokens.

    Args:
        gate_up: [M, 2 * K], the gates before the ups, last dimension contiguous.
        w: [N, K], contiguous.

    Returns:
        [M, N] in gate_up's dtype; silu(gate) * up is not rounded on the way.
    """
    m, k, n = _check(gate_up, w, 2 * w.shape[1])
    k //= 2
    config = config or default_rows(m, n)
    if out is None:
        out = gate_up.new_empty(m, n)
    silu_mul_matrix_vector_kernel[(triton.cdiv(n, config.block_n),)](
        gate_up,
        w,
        out,
        n,
        gate_up.stride(0),
        out.stride(0),
        M=m,
        K=k,
        **config.options(m),
    )
    return out


def _check(x: torch.Tensor, w: torch.Tensor, features: int) -> tuple[int, int, int]:
    """(tokens, features of x, rows of w), asserted to fit each other and this file's kernels."""
    m, k = x.shape
    assert 1 <= m <= MAX_TOKENS, f"{m} tokens, at most {MAX_TOKENS} are supported"
    assert k == features, f"x has {k} features, the weights need {features}"
    assert x.stride(1) == 1
    assert w.is_contiguous()
    return m, k, w.shape[0]
