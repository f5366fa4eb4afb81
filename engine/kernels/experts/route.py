"""Which experts each token uses."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.launch import overlap_options, wait_for_previous


@triton.jit
def route_kernel(
    logits_ptr,  # [T, E]
    experts_ptr,  # int32 [T, TOP_K]
    weights_ptr,  # fp32 [T, TOP_K]
    logits_stride,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_E: tl.constexpr,  # E and TOP_K, each rounded up to a power of two
    BLOCK_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program routes one token, by TOP_K passes over its logits, which stay in registers."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_E)
    places = tl.arange(0, BLOCK_K)
    wait_for_previous(OVERLAP)
    source = logits_ptr + token * logits_stride + columns
    logits = tl.load(source, mask=columns < E, other=float("-inf")).to(tl.float32)
    # Not-a-numbers come last, so that whatever is chosen is an expert that exists.
    left = tl.where(logits == logits, logits, float("-inf"))
    highest = tl.max(left, axis=0)
    total = tl.sum(tl.exp(left - highest), axis=0)
    experts = tl.zeros((BLOCK_K,), dtype=tl.int32)
    chosen = tl.full((BLOCK_K,), float("-inf"), dtype=tl.float32)
    for place in range(TOP_K):
        expert = tl.argmax(left, axis=0)  # the first of equals
        experts = tl.where(places == place, expert, experts)
        chosen = tl.where(places == place, tl.max(left, axis=0), chosen)
        left = tl.where(columns == expert, float("-inf"), left)
    weights = tl.exp(chosen - highest)
    if RENORMALISE:
        total = tl.sum(weights, axis=0)
    targets = token * TOP_K + places
    tl.store(experts_ptr + targets, experts, mask=places < TOP_K)
    tl.store(weights_ptr + targets, weights / total, mask=places < TOP_K)


def route(logits: torch.Tensor, top_k: int, *, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top_k` experts with the largest logits, from the largest on; the first of equal ones.

    Args:
        logits: [T, E], last dimension contiguous.
        renormalise: whether weights are the softmax of the chosen logits alone, and add up to 1.

    Returns:
        (experts [T, k] int32, weights [T, k] fp32).
    """
    num_tokens, num_experts = logits.shape
    experts = logits.new_empty(num_tokens, top_k, dtype=torch.int32)
    weights = logits.new_empty(num_tokens, top_k, dtype=torch.float32)
    if num_tokens == 0:
        return experts, weights
    route_kernel[(num_tokens,)](
        logits,
        experts,
        weights,
        logits.stride(0),
        E=num_experts,
        TOP_K=top_k,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_K=triton.next_power_of_2(top_k),
        RENORMALISE=renormalise,
        num_warps=1,
        **overlap_options(),
    )
    return experts, weights
