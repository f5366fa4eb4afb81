"""Head norms, rotary embedding and the paged cache's store in one kernel.

A program takes one token and a group of heads that are all queries, all keys or all values, so that every
branch is uniform, and neighbouring programs read neighbouring memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from engine.kernels.fp8.e4m3 import to_fp8
from engine.kernels.launch import overlap_options, wait_for_previous

if TYPE_CHECKING:  # needed for annotations alone, and much slower to import than Triton is to compile
    import torch


@triton.jit
def _rotate(
    head,
    cos,  # [HEADS, HALF], as all up to second_gain
    sin,
    first_gain,
    second_gain,
    eps,
    gap,
    mask,
    HEAD_DIM: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_ANGLES: tl.constexpr,
    dtype: tl.constexpr,
):
    """Loads the pairs of heads, their firsts and seconds [HEADS, HALF] each, and returns them normed, rotated
    and rounded."""
    first = tl.load(head, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(head + gap, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        mean = tl.sum(first * first + second * second, axis=1, keep_dims=True) / HEAD_DIM
        scale = tl.rsqrt(mean + eps)
        first = first * scale * first_gain
        second = second * scale * second_gain
    if not HAS_ANGLES:
        return first.to(dtype), second.to(dtype)
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@triton.jit
def _store_pairs(target, first, second, gap, mask):
    tl.store(target, first, mask=mask)
    tl.store(target + gap, second, mask=mask)


@triton.jit
def _store_in_cache(target, first, second, gap, mask, scale):
    if target.dtype.element_ty == tl.float8e4nv:
        first = to_fp8(first.to(tl.float32), scale)
        second = to_fp8(second.to(tl.float32), scale)
    _store_pairs(target, first, second, gap, mask)


@triton.jit
def _channels(pair, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first channel of each pair, and how far behind it the second is.

    Channels that are not rotated, those from ROTARY_DIM on, are paired by halves, behind the pairs that are.
    """
    is_rotated = pair < ROTARY_DIM // 2
    rotated_first = 2 * pair if INTERLEAVED else pair
    rotated_gap = 1 if INTERLEAVED else ROTARY_DIM // 2
    first = tl.where(is_rotated, rotated_first, pair + ROTARY_DIM // 2)
    return first, tl.where(is_rotated, rotated_gap, (HEAD_DIM - ROTARY_DIM) // 2)


# Tokens may begin anywhere in a step: their one-word loads must not compile anew for each alignment.
@triton.jit(do_not_specialize_on_alignment=["positions", "slot_mapping"])
def rotate_and_store_kernel(
    qkv,  # [T, (H + 2 * HK) * D]
    positions,  # [T] or None
    table,  # [max_pos, ROTARY_DIM] or None
    key_cache,  # [num_blocks, block_size, HK, D]
    value_cache,
    slot_mapping,  # [T]
    q_norm,  # [D] or None
    k_norm,
    kv_scales,  # fp32 [2] or None
    eps,
    qkv_stride,
    cache_block_stride,
    cache_slot_stride,
    cache_head_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program: one token, HEADS heads of one kind; queries come first, then keys, then values."""
    query_groups: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    kv_groups: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    dtype: tl.constexpr = qkv.dtype.element_ty
    program = tl.program_id(0)
    token = program // (query_groups + 2 * kv_groups)
    group = program % (query_groups + 2 * kv_groups)
    row = token.to(tl.int64)
    is_query = group < query_groups
    is_value = group >= query_groups + kv_groups
    pair = tl.arange(0, HALF)[None, :]  # [1, HALF]
    if ROTARY_DIM == HEAD_DIM and not INTERLEAVED:
        column, gap = pair, HEAD_DIM // 2
    else:
        column, gap = _channels(pair, HEAD_DIM, ROTARY_DIM, INTERLEAVED)
    lane = tl.arange(0, HEADS)[:, None]  # [HEADS, 1]
    in_half = pair < HEAD_DIM // 2
    head = tl.where(is_query, group, (group - query_groups) % kv_groups) * HEADS + lane
    num_heads = tl.where(is_query, NUM_HEADS, NUM_KV_HEADS)
    mask = (head < num_heads) & in_half

    # Made at the start of the step, long before the product that this launch follows.
    if ROTARY_DIM > 0:
        position = tl.load(positions + token, cache_modifier=".cg")
    slot = tl.load(slot_mapping + token, cache_modifier=".cg")
    # Each head's threads load what all heads share: that is cheaper than exchanging it between threads.
    channel = tl.broadcast_to(column, mask.shape)  # [HEADS, HALF]
    rotated = (head < tl.where(is_value, 0, num_heads)) & in_half
    cos = 1.0
    sin = 0.0
    if ROTARY_DIM > 0:
        turned = rotated
        unturned = 0.0
        if ROTARY_DIM < HEAD_DIM:
            turned = rotated & (pair < ROTARY_DIM // 2)
            unturned = 1.0
        angles = table + position.to(tl.int64) * ROTARY_DIM + tl.broadcast_to(pair, mask.shape)
        cos = tl.load(angles, mask=turned, other=unturned).to(tl.float32)
        sin = tl.load(angles + ROTARY_DIM // 2, mask=turned, other=0.0).to(tl.float32)
    first_gain = 1.0
    second_gain = 1.0
    if q_norm is not None:
        gain = tl.where(is_query, q_norm, k_norm) + channel
        first_gain = tl.load(gain, mask=rotated, other=0.0).to(tl.float32)
        second_gain = tl.load(gain + gap, mask=rotated, other=0.0).to(tl.float32)
    cache_scale = 1.0
    if kv_scales is not None:
        cache_scale = tl.load(kv_scales + is_value.to(tl.int32))
    wait_for_previous(OVERLAP)

    if is_query:
        source = qkv + row * qkv_stride + head * HEAD_DIM + column
        # fmt: off
        first, second = _rotate(
            source, cos, sin, first_gain, second_gain, eps, gap, mask,
            HEAD_DIM, q_norm is not None, ROTARY_DIM > 0, dtype,
        )
        # fmt: on
        _store_pairs(source, first, second, gap, mask)
    else:
        # Rows of keys, then of values, behind the queries.
        behind = tl.where(is_value, NUM_HEADS + NUM_KV_HEADS, NUM_HEADS)
        source = qkv + row * qkv_stride + (behind + head) * HEAD_DIM + column
        place = (
            (slot // BLOCK_SIZE).to(tl.int64) * cache_block_stride
            + (slot % BLOCK_SIZE).to(tl.int64) * cache_slot_stride
            + head.to(tl.int64) * cache_head_stride
            + column
        )
        stored = (head < tl.where(slot >= 0, NUM_KV_HEADS, 0)) & in_half
        if is_value:
            first = tl.load(source, mask=mask, other=0.0)
            second = tl.load(source + gap, mask=mask, other=0.0)
            _store_in_cache(value_cache + place, first, second, gap, stored, cache_scale)
        else:
            # fmt: off
            first, second = _rotate(
                source, cos, sin, first_gain, second_gain, eps, gap, mask,
                HEAD_DIM, q_norm is not None, ROTARY_DIM > 0, dtype,
            )
            # fmt: on
            _store_in_cache(key_cache + place, first, second, gap, stored, cache_scale)


def rotate_and_store(
    qkv: torch.Tensor,
    positions: torch.Tensor | None,
    table: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Norms and rotates (each if asked) queries and keys, and stores keys and values in the paged cache.

    Rotation (arXiv:2104.09864) makes (a cos - b sin, b cos + a sin) of each pair (a, b) of a head's first R
    channels, and leaves the others. All of it is computed in fp32 and rounded once.

    Args:
        qkv: [T, (H + 2 * HK) * D], queries, keys, values; rows may be strided. Its queries are overwritten.
        positions: [T] int32, rows of the table. Like slot_mapping, not written by the launch just before.
        table: [max_pos, R] contiguous, cosines of the R/2 pairs, then sines. Where it and positions are None,
            nothing is rotated.
        key_cache, value_cache: [num_blocks, block_size, HK, D], strided alike, channels contiguous.
        slot_mapping: [T] int32 or int64, block_id * block_size + offset; -1 stores nothing.
        q_norm, k_norm: [D] weights of the RMSNorm over each head's channels (Qwen3), with its eps.
        interleaved: channel 2i pairs with 2i + 1; else i with i + R/2.
        kv_scales: fp32 [2], for caches of float8_e4m3fn: what their numbers are to be multiplied with, keys'
            and values'. What is too large becomes the largest.

    Returns:
        The queries, [T, H, D]: a strided view of qkv.
    """
    num_tokens = qkv.shape[0]
    query = qkv[:, : num_heads * head_dim].unflatten(1, (num_heads, head_dim))
    if num_tokens == 0:
        return query
    block_stride, slot_stride, head_stride, _ = key_cache.stride()
    assert value_cache.stride() == key_cache.stride(), "keys and values must be laid out alike"
    heads, half, num_warps = launch_shape(head_dim)
    groups = -(-num_heads // heads) + 2 * -(-num_kv_heads // heads)
    rotate_and_store_kernel[(num_tokens * groups,)](
        qkv,
        positions,
        table,
        key_cache,
        value_cache,
        slot_mapping,
        q_norm,
        k_norm,
        kv_scales,
        eps,
        qkv.stride(0),
        block_stride,
        slot_stride,
        head_stride,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=key_cache.shape[1],
        HEADS=heads,
        HALF=half,
        ROTARY_DIM=0 if table is None else table.shape[1],
        INTERLEAVED=interleaved,
        num_warps=num_warps,
        **overlap_options(),
    )
    return query


def launch_shape(head_dim: int) -> tuple[int, int, int]:
    """(HEADS, HALF, num_warps): about 1,024 channels a program, eight (16 bytes) a thread and half."""
    half = triton.next_power_of_2(head_dim // 2)
    return max(512 // half, 1), half, 2
