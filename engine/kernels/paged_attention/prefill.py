"""Paged attention of chunks of tokens, any mix of lengths with any context before them, in one launch.

A program computes BLOCK_Q tokens of one chunk for all query heads that share a key-value head: they are the
rows of one matrix, so that a tile of keys and values is read once for all of them. The loop is
FlashAttention-2's (Dao, 2023): tiles that every row sees whole need no mask.

A row's result does not depend, bit for bit, on how the batch and its chunks are cut: tiles of the context
begin at multiples of BLOCK_N whatever the chunk, every row adds them in the same order, and a tile that a row
does not see leaves its sums as they were. Chunks of one token are decodes; they may be served so, and cost
more than by `paged_decode_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from engine.kernels.paged_attention.decode import (
    LOG2_E,
    as_operand,
    final_scores,
    padded_head_dim,
    scales_of,
)


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """What one program does: `block_m` rows (tokens x heads of a group) against `block_n` tokens a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def prefill_config(head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> PrefillConfig:
    """The configuration for a model: one for all its batches, since results depend on it bit for bit.

    Args:
        dtype: of queries.
        cache_dtype: of keys and values.
    """
    if dtype == torch.float32:
        # No tensor cores: larger tiles do not fit in registers.
        size = 16 if head_dim > 128 else 32
        return PrefillConfig(block_m=size, block_n=size, num_warps=4, num_stages=2)
    if head_dim > 128:
        return PrefillConfig(block_m=128, block_n=64, num_warps=8, num_stages=2)
    if cache_dtype.itemsize == 1:
        # Each tile is converted by every program that reads it: the more tokens share one, the better. Twice
        # as many were 3 % faster still, with long prompts, and would have twice as many rows of padding.
        return PrefillConfig(block_m=128, block_n=128, num_warps=8, num_stages=3)
    return PrefillConfig(block_m=64, block_n=64, num_warps=4, num_stages=3)


def prefill_block_q(num_heads: int, num_kv_heads: int, config: PrefillConfig) -> int:
    """Tokens of a chunk that one program computes."""
    return config.block_m // (num_heads // num_kv_heads)


def prefill_tiles(
    counts: npt.NDArray[np.integer], seq_lens: npt.NDArray[np.integer], block_q: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Cuts a step's chunks into tiles of `block_q` tokens, those that see the longest context first.

    Args:
        counts: tokens of each request's chunk, [S].
        seq_lens: its context, the chunk included, [S].

    Returns:
        tile_request, tile_start: each tile's request and its first token within the request's chunk.
    """
    tiles_of = -(-counts // block_q)
    request = np.repeat(np.arange(len(counts)), tiles_of)
    start = (np.arange(len(request)) - np.repeat(np.cumsum(tiles_of) - tiles_of, tiles_of)) * block_q
    visible = (seq_lens - counts)[request] + np.minimum(start + block_q, counts[request])
    order = np.argsort(-visible, kind="stable")
    return request[order].astype(np.int32), start[order].astype(np.int32)


def max_prefill_tiles(num_tokens: int, num_requests: int, block_q: int) -> int:
    """The most tiles that this many tokens can make in chunks of up to this many requests."""
    num_requests = min(num_requests, num_tokens)
    return (num_tokens + num_requests * (block_q - 1)) // block_q


def paged_prefill_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    block_table: torch.Tensor,
    rows: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    tile_request: torch.Tensor,
    tile_start: torch.Tensor,
    scale: float,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    kv_scales: torch.Tensor | None = None,
    out: torch.Tensor,
    config: PrefillConfig | None = None,
) -> torch.Tensor:
    """Causal attention of chunks of tokens, each the last ones of its request's context.

    Args:
        query: [P, H, D], strided, its last dimension contiguous.
        key_cache, value_cache: [num_blocks, block_size, HK, D], strided, the last dimension contiguous; they
            hold the chunks' own keys and values already. block_size is a power of two.
        block_table: [R, B] int32, block ids in sequence order.
        rows: [S] int32, the row of the block table of each request.
        query_start_loc: [S + 1] int32; request i owns query tokens query_start_loc[i] to [i + 1].
        seq_lens: [S] int32, tokens in each context, its chunk included.
        tile_request, tile_start: [num_tiles] int32, see `prefill_tiles`; a request of -1 marks padding.
        scale: what scores are multiplied with, positive.
        sliding_window, soft_cap, alibi_slopes, sinks, kv_scales: as for `paged_decode_attention`.
        out: [P, H, D], as strided as the query may be; tokens in no tile are left as they are.
        config: to choose between in benchmarks; by default `prefill_config`. The tiles must be made for it.

    Returns:
        out.
    """
    _, num_heads, head_dim = query.shape
    block_size, num_kv_heads = key_cache.shape[1], key_cache.shape[2]
    config = config or prefill_config(head_dim, query.dtype, key_cache.dtype)
    _prefill_kernel[(num_kv_heads, tile_request.shape[0])](
        query,
        key_cache,
        value_cache,
        block_table,
        rows,
        query_start_loc,
        seq_lens,
        tile_request,
        tile_start,
        out,
        alibi_slopes,
        sinks,
        kv_scales,
        scale * LOG2_E.value,
        sliding_window,
        QUERY_STRIDE_TOKEN=query.stride(0),
        QUERY_STRIDE_HEAD=query.stride(1),
        KEY_STRIDE_BLOCK=key_cache.stride(0),
        KEY_STRIDE_SLOT=key_cache.stride(1),
        KEY_STRIDE_HEAD=key_cache.stride(2),
        VALUE_STRIDE_BLOCK=value_cache.stride(0),
        VALUE_STRIDE_SLOT=value_cache.stride(1),
        VALUE_STRIDE_HEAD=value_cache.stride(2),
        TABLE_STRIDE=block_table.stride(0),
        OUT_STRIDE_TOKEN=out.stride(0),
        OUT_STRIDE_HEAD=out.stride(1),
        BLOCK_SIZE=block_size,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_Q=prefill_block_q(num_heads, num_kv_heads, config),
        BLOCK_M=config.block_m,
        BLOCK_D=padded_head_dim(head_dim),
        BLOCK_N=config.block_n,
        HAS_WINDOW=sliding_window > 0,
        SOFT_CAP=soft_cap,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


@triton.jit(do_not_specialize=["window"])
def _prefill_kernel(
    query_ptr,  # [P, H, D]
    key_ptr,  # [num_blocks, BLOCK_SIZE, HK, D]
    value_ptr,  # [num_blocks, BLOCK_SIZE, HK, D]
    table_ptr,  # [R, B]
    rows_ptr,  # [S]
    query_start_loc_ptr,  # [S + 1]
    seq_lens_ptr,  # [S]
    tile_request_ptr,  # [num_tiles]
    tile_start_ptr,  # [num_tiles]
    out_ptr,  # [P, H, D]
    slopes_ptr,  # [H] or None
    sinks_ptr,  # [H] or None
    kv_scales_ptr,  # [2] or None
    scale,
    window,
    QUERY_STRIDE_TOKEN: tl.constexpr,
    QUERY_STRIDE_HEAD: tl.constexpr,
    KEY_STRIDE_BLOCK: tl.constexpr,
    KEY_STRIDE_SLOT: tl.constexpr,
    KEY_STRIDE_HEAD: tl.constexpr,
    VALUE_STRIDE_BLOCK: tl.constexpr,
    VALUE_STRIDE_SLOT: tl.constexpr,
    VALUE_STRIDE_HEAD: tl.constexpr,
    TABLE_STRIDE: tl.constexpr,
    OUT_STRIDE_TOKEN: tl.constexpr,
    OUT_STRIDE_HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    # Heads vary fastest, so that the longest tiles of all heads start first.
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    request = tl.load(tile_request_ptr + tile)
    if request < 0:
        return
    tile_start = tl.load(tile_start_ptr + tile)
    query_begin = tl.load(query_start_loc_ptr + request)
    count = tl.load(query_start_loc_ptr + request + 1) - query_begin
    seq_len = tl.load(seq_lens_ptr + request)
    row = tl.load(rows_ptr + request).to(tl.int64)

    lanes = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    tokens = tile_start + lanes // GROUP
    heads = kv_head * GROUP + lanes % GROUP
    in_tile = ((lanes < BLOCK_Q * GROUP) & (tokens < count))[:, None] & (dims < HEAD_DIM)[None, :]
    query_rows = (query_begin + tokens).to(tl.int64) * QUERY_STRIDE_TOKEN + heads * QUERY_STRIDE_HEAD
    query = as_operand(
        tl.load(query_ptr + query_rows[:, None] + dims[None, :], mask=in_tile, other=0.0), key_ptr
    )
    scale, value_scale = scales_of(scale, kv_scales_ptr)

    positions = seq_len - count + tokens
    first_position = seq_len - count + tile_start
    end = tl.minimum(first_position + BLOCK_Q, seq_len)
    # What every row sees: tiles from full_begin to full_end.
    oldest = 0
    full_begin = 0
    full_end = (first_position + 1) // BLOCK_N * BLOCK_N
    if HAS_WINDOW:
        oldest = tl.maximum(first_position - window + 1, 0)
        full_begin = tl.minimum(tl.cdiv(tl.maximum(end - window, 0), BLOCK_N) * BLOCK_N, full_end)
    highest = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    slopes = None
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + heads)
    if sinks_ptr is not None:
        highest = tl.load(sinks_ptr + heads).to(tl.float32) * LOG2_E
        total += 1
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    key_ptr += kv_head * KEY_STRIDE_HEAD
    value_ptr += kv_head * VALUE_STRIDE_HEAD
    table_ptr += row * TABLE_STRIDE
    # fmt: off
    if HAS_WINDOW:
        acc, total, highest = attend_tiles(
            acc, total, highest, query, positions, slopes, key_ptr, value_ptr, table_ptr,
            oldest // BLOCK_N * BLOCK_N, full_begin, oldest, end, scale, window,
            KEY_STRIDE_BLOCK, KEY_STRIDE_SLOT, VALUE_STRIDE_BLOCK, VALUE_STRIDE_SLOT,
            BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, HAS_WINDOW, SOFT_CAP, True,
        )
    acc, total, highest = attend_tiles(
        acc, total, highest, query, positions, slopes, key_ptr, value_ptr, table_ptr,
        full_begin, full_end, oldest, end, scale, window,
        KEY_STRIDE_BLOCK, KEY_STRIDE_SLOT, VALUE_STRIDE_BLOCK, VALUE_STRIDE_SLOT,
        BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, HAS_WINDOW, SOFT_CAP, False,
    )
    acc, total, highest = attend_tiles(
        acc, total, highest, query, positions, slopes, key_ptr, value_ptr, table_ptr,
        full_end, end, oldest, end, scale, window,
        KEY_STRIDE_BLOCK, KEY_STRIDE_SLOT, VALUE_STRIDE_BLOCK, VALUE_STRIDE_SLOT,
        BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, HAS_WINDOW, SOFT_CAP, True,
    )
    # fmt: on
    out = acc / total[:, None] * value_scale
    out_rows = (query_begin + tokens).to(tl.int64) * OUT_STRIDE_TOKEN + heads * OUT_STRIDE_HEAD
    tl.store(out_ptr + out_rows[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=in_tile)


@triton.jit
def attend_tiles(
    acc,  # [BLOCK_M, BLOCK_D]
    total,  # [BLOCK_M]
    highest,  # [BLOCK_M]
    query,  # [BLOCK_M, BLOCK_D]
    positions,  # [BLOCK_M]
    slopes,  # [BLOCK_M] or None
    key_ptr,
    value_ptr,
    table_ptr,
    begin,
    end,
    oldest,
    context_end,
    scale,
    window,
    KEY_STRIDE_BLOCK: tl.constexpr,
    KEY_STRIDE_SLOT: tl.constexpr,
    VALUE_STRIDE_BLOCK: tl.constexpr,
    VALUE_STRIDE_SLOT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds the tiles of the context from `begin` (a multiple of BLOCK_N) until `end` is passed.

    No token outside `oldest` to `context_end` is read. The arithmetic, its fused multiply-adds too, is the
    same whether masked or not, since the same tile may be either, depending on how a chunk is cut.
    """
    FINAL: tl.constexpr = SOFT_CAP > 0 or slopes is not None
    dims = tl.arange(0, BLOCK_D)
    tokens = begin + tl.arange(0, BLOCK_N)
    # A tile's block ids are read while the tile before it is asked for, so that its addresses never wait.
    blocks = tl.load(
        table_ptr + tokens // BLOCK_SIZE, mask=(tokens >= oldest) & (tokens < context_end), other=0
    )
    for first in range(begin, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        slots = tokens & (BLOCK_SIZE - 1)
        key_offsets = blocks.to(tl.int64) * KEY_STRIDE_BLOCK + slots * KEY_STRIDE_SLOT
        value_offsets = blocks.to(tl.int64) * VALUE_STRIDE_BLOCK + slots * VALUE_STRIDE_SLOT
        key_ptrs = key_ptr + key_offsets[:, None] + dims[None, :]
        value_ptrs = value_ptr + value_offsets[:, None] + dims[None, :]
        if MASKED:
            # What is left in other slots may be NaN, which a weight of zero would keep.
            inside = ((tokens >= oldest) & (tokens < context_end))[:, None] & (dims < HEAD_DIM)[None, :]
            key = tl.load(key_ptrs, mask=inside, other=0.0)
            value = tl.load(value_ptrs, mask=inside, other=0.0)
        elif HEAD_DIM != BLOCK_D:
            key = tl.load(key_ptrs, mask=(dims < HEAD_DIM)[None, :], other=0.0)
            value = tl.load(value_ptrs, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        else:
            key = tl.load(key_ptrs)
            value = tl.load(value_ptrs)
        following = tokens + BLOCK_N
        blocks = tl.load(table_ptr + following // BLOCK_SIZE, mask=following < context_end, other=0)

        value = value.to(query.dtype)
        scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee")
        if FINAL:
            distances = positions[:, None] - tokens[None, :]
            scores = final_scores(scores, scale, distances, slopes, SOFT_CAP)
        if MASKED:
            seen = tokens[None, :] <= positions[:, None]
            if HAS_WINDOW:
                seen = seen & (tokens[None, :] > positions[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        if FINAL:
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp2(scores - new_highest[:, None])
        else:
            new_highest = tl.maximum(highest, tl.max(scores, 1) * scale)
            weights = tl.exp2(tl.fma(scores, scale, -new_highest[:, None]))
        decay = tl.exp2(highest - new_highest)
        total = tl.fma(total, decay, tl.sum(weights, 1))
        acc = tl.dot(weights.to(value.dtype), value, acc * decay[:, None], input_precision="ieee")
        highest = new_highest
    return acc, total, highest
