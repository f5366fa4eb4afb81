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
        overlap: load the first weights while the kernel before still runs; see engine/kernels/launch.py.
    """

    block_n: int
    num_warps: int = 4
    overlap: bool = False

    @property
    def block_k(self) -> int:
        """Weights of a row that are loaded together."""
        return 8 * 32 * self.num_warps


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


def one_token_rows(n: int) -> RowsConfig:
    """For one token times n rows: no more of them a program than lets the programs fill the chip."""
    return RowsConfig(block_n=4 if n >= 8192 else 2 if n >= 2048 else 1)


def matrix_vector(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, *, config: RowsConfig
) -> torch.Tensor:
    """x @ w.T + bias for 1 to MAX_TOKENS tokens.

    Args:
        x: [M, K], last dimension contiguous.
        w: [N, K], contiguous.
        bias: [N].

    Returns:
        [M, N] in x's dtype.
    """
    (m, k), n = x.shape, w.shape[0]
    assert 1 <= m <= MAX_TOKENS, f"{m} tokens, at most {MAX_TOKENS} are supported"
    assert w.shape[1] == k, f"x has {k} features, the weights {w.shape[1]}"
    assert x.stride(1) == 1
    assert w.is_contiguous()
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
        BLOCK_M=triton.next_power_of_2(m),
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        HAS_BIAS=bias is not None,
        num_warps=config.num_warps,
        **(overlap_options() if config.overlap else ORDINARY),
    )
    return out
