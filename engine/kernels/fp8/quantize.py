"""Inputs of products, quantized to e4m3: each token, or each group of its inputs, by its own scale."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.fp8.e4m3 import scale_of, to_fp8
from engine.kernels.launch import overlap_options, wait_for_previous

# Inputs of a program where a token has several scales.
_PROGRAM_INPUTS = 2048
_INPUTS_OF_A_WARP = 1024
_MOST_WARPS = 32


@triton.jit(do_not_specialize=["num_tokens"])
def quantize_kernel(
    x_ptr,  # [T, K]
    codes_ptr,  # e4m3 [T, K]
    scales_ptr,  # fp32 [groups, T]
    static_ptr,  # fp32 [1], or None
    num_tokens,
    x_stride,
    K: tl.constexpr,
    GROUP: tl.constexpr,  # inputs of a scale
    BLOCK_G: tl.constexpr,  # groups of a program
    BLOCK_K: tl.constexpr,  # GROUP rounded up to a power of two
    OVERLAP: tl.constexpr,
):
    """One program quantizes BLOCK_G groups of one token."""
    NUM_GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    CHUNKS: tl.constexpr = (NUM_GROUPS + BLOCK_G - 1) // BLOCK_G
    token = (tl.program_id(0) // CHUNKS).to(tl.int64)
    groups = tl.program_id(0) % CHUNKS * BLOCK_G + tl.arange(0, BLOCK_G)
    within = tl.arange(0, BLOCK_K)[None, :]
    columns = groups[:, None] * GROUP + within  # [BLOCK_G, BLOCK_K]
    mask = (within < GROUP) & (columns < K)
    wait_for_previous(OVERLAP)
    values = tl.load(x_ptr + token * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if static_ptr is None:
        scales = scale_of(tl.max(tl.abs(values), axis=1))
    else:
        scales = tl.load(static_ptr) + tl.zeros((BLOCK_G,), dtype=tl.float32)
    tl.store(scales_ptr + groups.to(tl.int64) * num_tokens + token, scales, mask=groups < NUM_GROUPS)
    tl.store(codes_ptr + token * K + columns, to_fp8(values, scales[:, None]), mask=mask)


def quantize(
    x: torch.Tensor, group: int, static_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x in e4m3, saturated.

    Args:
        x: [T, K]; rows may be strided, inputs are contiguous.
        group: inputs that share a scale, their largest magnitude over 448; K for a scale a token.
        static_scale: fp32 [1], of all inputs instead.

    Returns:
        (float8_e4m3fn [T, K], scales fp32 [ceil(K / group), T]).
    """
    num_tokens, in_features = x.shape
    num_groups = triton.cdiv(in_features, group)
    codes = x.new_empty((num_tokens, in_features), dtype=torch.float8_e4m3fn)
    scales = x.new_empty((num_groups, num_tokens), dtype=torch.float32)
    if num_tokens == 0:
        return codes, scales
    block_k = triton.next_power_of_2(group)
    block_g = 1 if num_groups == 1 else max(1, _PROGRAM_INPUTS // block_k)
    num_warps = max(4, min(_MOST_WARPS, block_k * block_g // _INPUTS_OF_A_WARP))
    quantize_kernel[(num_tokens * triton.cdiv(num_groups, block_g),)](
        x,
        codes,
        scales,
        static_scale,
        num_tokens,
        x.stride(0),
        K=in_features,
        GROUP=group,
        BLOCK_G=block_g,
        BLOCK_K=block_k,
        num_warps=num_warps,
        **overlap_options(),
    )
    return codes, scales
