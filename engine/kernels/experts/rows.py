"""What experts make of a few tokens, by plain multiply-adds.

So few tokens hardly share experts, and nothing but reading the weights matters. As in
linear/matrix_vector.py, threads lie side by side along K and take sums once at the end. A program of the
first product computes some channels of one pair of a token and an expert; one of the second, some channels of
one token, of all its experts in turn, so that nothing is left to be added up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.experts.parts import (
    GROUP,
    GROUP_BYTES,
    ExpertMatrices,
    Gating,
    e2m1_values,
    e8m0_values,
    gated,
)
from engine.kernels.launch import overlap_options, settle_keys, wait_for_previous

_NUM_WARPS = 4
# Each of 128 threads loads 16 bytes of a row at a time.
_ROW_BYTES = 16 * 32 * _NUM_WARPS


@triton.jit
def _products(
    w_ptr, scales_ptr, x_ptr, rows, k,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # What is to be added up of rows [N] of a matrix times x [K], of the BLOCK elements of storage from k on:
    # [N, BLOCK] in fp32. Of MXFP4 an element of storage is two weights.
    stored = k + tl.arange(0, BLOCK)[None, :]
    if scales_ptr is None:
        mask = stored < K
        w = tl.load(w_ptr + rows[:, None] * K + stored, mask=mask, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + stored, mask=mask, other=0.0, eviction_policy="evict_last")
        product = w.to(tl.float32) * x.to(tl.float32)
    else:
        mask = stored < K // 2
        packed = tl.load(w_ptr + rows[:, None] * (K // 2) + stored, mask=mask, other=0)
        groups = rows[:, None] * (K // (2 * GROUP_BYTES)) + stored // GROUP_BYTES
        exponents = tl.load(scales_ptr + groups, mask=mask, other=0)
        codes = packed.to(tl.int32)
        first = tl.load(x_ptr + 2 * stored, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x_ptr + 2 * stored + 1, mask=mask, other=0.0).to(tl.float32)
        product = e2m1_values(codes) * first + e2m1_values(codes >> 4) * second
        product *= e8m0_values(exponents.to(tl.int32))
    return product


@triton.jit
def gate_up_rows_kernel(
    x_ptr,  # [T, K]
    experts_ptr,  # int32 [T, TOP_K]
    w_ptr,  # [E, 2 * N, K]
    scales_ptr,  # [E, 2 * N, K / 32] or None
    bias_ptr,  # [E, 2 * N] or None
    out_ptr,  # [T * TOP_K, N]
    x_stride,
    TOP_K: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    STORED_K: tl.constexpr,  # elements of storage of a row
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    programs: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pair = tl.program_id(0) // programs
    channels = tl.program_id(0) % programs * BLOCK_N + tl.arange(0, BLOCK_N)
    wait_for_previous(OVERLAP)
    expert = tl.load(experts_ptr + pair).to(tl.int64)
    x = x_ptr + (pair // TOP_K).to(tl.int64) * x_stride
    # Channels past the end are the last one again, which costs no mask, and are not stored.
    gate_rows = expert * (2 * N) + tl.minimum(channels, N - 1)
    gate = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for k in range(0, STORED_K, BLOCK_K):
        gate += _products(w_ptr, scales_ptr, x, gate_rows, k, K, BLOCK_K)
        up += _products(w_ptr, scales_ptr, x, gate_rows + N, k, K, BLOCK_K)
    gate, up = tl.sum(gate, axis=1), tl.sum(up, axis=1)
    if bias_ptr is not None:
        gate += tl.load(bias_ptr + gate_rows).to(tl.float32)
        up += tl.load(bias_ptr + gate_rows + N).to(tl.float32)
    result = gated(gate, up, KIND, ALPHA, LIMIT)
    target = out_ptr + pair.to(tl.int64) * N + channels
    tl.store(target, result.to(out_ptr.dtype.element_ty), mask=channels < N)


@triton.jit
def down_rows_kernel(
    x_ptr,  # [T * TOP_K, K]
    experts_ptr,  # int32 [T, TOP_K]
    shares_ptr,  # fp32 [T, TOP_K]
    w_ptr,  # [E, N, K]
    scales_ptr,  # [E, N, K / 32] or None
    bias_ptr,  # [E, N] or None
    out_ptr,  # [T, N]
    TOP_K: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    STORED_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    programs: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    token = tl.program_id(0) // programs
    channels = tl.program_id(0) % programs * BLOCK_N + tl.arange(0, BLOCK_N)
    wait_for_previous(OVERLAP)
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    biases = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for place in range(TOP_K):
        pair = token * TOP_K + place
        expert = tl.load(experts_ptr + pair).to(tl.int64)
        share = tl.load(shares_ptr + pair)
        rows = expert * N + tl.minimum(channels, N - 1)
        x = x_ptr + pair.to(tl.int64) * K
        for k in range(0, STORED_K, BLOCK_K):
            acc += share * _products(w_ptr, scales_ptr, x, rows, k, K, BLOCK_K)
        if bias_ptr is not None:
            biases += share * tl.load(bias_ptr + rows).to(tl.float32)
    result = tl.sum(acc, axis=1) + biases
    target = out_ptr + token.to(tl.int64) * N + channels
    tl.store(target, result.to(out_ptr.dtype.element_ty), mask=channels < N)


settle_keys(_products)


def apply_by_rows(
    x: torch.Tensor,
    experts: torch.Tensor,
    shares: torch.Tensor,
    gate_up: ExpertMatrices,
    down: ExpertMatrices,
    gating: Gating,
) -> torch.Tensor:
    """What `apply_experts` returns, whose arguments these are."""
    num_tokens, top_k = experts.shape
    hidden, inner = x.shape[1], down.in_features
    made = x.new_empty(num_tokens * top_k, inner)
    block_n = 1 if gate_up.scales is None else 2
    gate_up_rows_kernel[(num_tokens * top_k * triton.cdiv(inner, block_n),)](
        x,
        experts,
        gate_up.weight,
        gate_up.scales,
        gate_up.bias,
        made,
        x.stride(0),
        TOP_K=top_k,
        N=inner,
        BLOCK_N=block_n,
        KIND=gating.kind,
        ALPHA=gating.alpha,
        LIMIT=gating.limit,
        **_row_sizes(gate_up),
    )
    out = x.new_empty(num_tokens, hidden)
    block_n = 2
    down_rows_kernel[(num_tokens * triton.cdiv(hidden, block_n),)](
        made,
        experts,
        shares,
        down.weight,
        down.scales,
        down.bias,
        out,
        TOP_K=top_k,
        N=hidden,
        BLOCK_N=block_n,
        **_row_sizes(down),
    )
    return out


def _row_sizes(matrices: ExpertMatrices) -> dict[str, int | bool]:
    stored = matrices.weight.shape[2]
    assert matrices.scales is None or matrices.in_features % GROUP == 0
    block = min(_ROW_BYTES // matrices.weight.element_size(), triton.next_power_of_2(stored))
    return {
        "K": matrices.in_features,
        "STORED_K": stored,
        "BLOCK_K": block,
        "num_warps": _NUM_WARPS,
        **overlap_options(),
    }
