"""Attention of many decodes to a prefix that they share: read once per tile of queries, not once per request.

The queries of all requests to one key-value head are the rows of one matrix, so that the prefix's keys and
values meet tensor cores in full tiles. What comes of it are shares in the decode's workspace: the decode
starts behind the prefix, and merges them with its own (the cascade of Hydragen, Juravsky et al., 2024).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.paged_attention.decode import (
    LOG2_E,
    MAX_SPLITS,
    DecodeWorkspace,
    SharedPrefix,
    as_operand,
    decode_splits,
    padded_head_dim,
    scales_of,
    share_of,
    split_workspace,
)
from engine.kernels.paged_attention.prefill import PrefillConfig, attend_tiles, prefill_config


def prefix_splits(num_seqs: int, num_heads: int, num_kv_heads: int, num_sms: int, block_m: int) -> int:
    """Into how many shares the prefix is cut so that the launch is one wave of programs, nearly full."""
    rows = num_seqs * (num_heads // num_kv_heads)
    programs = num_kv_heads * triton.cdiv(rows, block_m)
    return max(1, min(MAX_SPLITS.value // 2, num_sms // programs))


def prefix_workspace(
    max_num_seqs: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_sms: int,
    block_m: int,
    device: torch.device,
) -> DecodeWorkspace:
    """A workspace for decodes of up to `max_num_seqs` requests, with and without a shared prefix."""
    shares = (
        n
        * (
            decode_splits(n, num_kv_heads, num_sms)
            + prefix_splits(n, num_heads, num_kv_heads, num_sms, block_m)
        )
        for n in range(1, max_num_seqs + 1)
    )
    return split_workspace(max_num_seqs, max(shares), num_heads, num_kv_heads, head_dim, device)


def shared_prefix_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    block_table: torch.Tensor,
    prefix_row: torch.Tensor,
    prefix_len: torch.Tensor,
    prefix_lens: torch.Tensor,
    scale: float,
    soft_cap: float = 0.0,
    num_splits: int,
    num_prefix_splits: int,
    kv_scales: torch.Tensor | None = None,
    workspace: DecodeWorkspace,
    config: PrefillConfig | None = None,
) -> SharedPrefix:
    """Attention of each request's newest token to the first tokens of one context, left in the workspace.

    Args:
        query, key_cache, value_cache, block_table, scale, soft_cap, kv_scales: as for
            `paged_decode_attention`. Where a score depends on the distance to the query (a window, ALiBi),
            nothing can be shared.
        prefix_row: [1] int32, a row of the block table that begins with the prefix.
        prefix_len: [1] int32, its length; 0 for none in this step, which costs next to nothing.
        prefix_lens: [S] int32: that length for requests that begin with the prefix, 0 for others.
        num_splits: the decode's, see `decode_splits`.
        num_prefix_splits: see `prefix_splits`; with num_splits MAX_SPLITS at most.
        workspace: of at least S x (num_splits + num_prefix_splits) shares.
        config: to choose between in benchmarks; by default `prefill_config`.

    Returns:
        What `paged_decode_attention` must be told, called next with the same query and workspace.
    """
    num_seqs, num_heads, head_dim = query.shape
    block_size, num_kv_heads = key_cache.shape[1], key_cache.shape[2]
    group = num_heads // num_kv_heads
    config = config or prefill_config(head_dim, query.dtype, key_cache.dtype)
    assert num_splits + num_prefix_splits <= MAX_SPLITS.value
    _prefix_kernel[(num_kv_heads, triton.cdiv(num_seqs * group, config.block_m), num_prefix_splits)](
        query,
        key_cache,
        value_cache,
        block_table,
        prefix_row,
        prefix_len,
        workspace.partials,
        workspace.log_sums,
        kv_scales,
        scale * LOG2_E.value,
        num_seqs,
        num_splits,
        QUERY_STRIDE_TOKEN=query.stride(0),
        QUERY_STRIDE_HEAD=query.stride(1),
        KEY_STRIDE_BLOCK=key_cache.stride(0),
        KEY_STRIDE_SLOT=key_cache.stride(1),
        KEY_STRIDE_HEAD=key_cache.stride(2),
        VALUE_STRIDE_BLOCK=value_cache.stride(0),
        VALUE_STRIDE_SLOT=value_cache.stride(1),
        VALUE_STRIDE_HEAD=value_cache.stride(2),
        TABLE_STRIDE=block_table.stride(0),
        BLOCK_SIZE=block_size,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_M=config.block_m,
        BLOCK_D=padded_head_dim(head_dim),
        BLOCK_N=config.block_n,
        SOFT_CAP=soft_cap,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return SharedPrefix(prefix_lens, num_prefix_splits, config.block_n)


@triton.jit(do_not_specialize=["num_seqs", "num_splits"])
def _prefix_kernel(
    query_ptr,  # [S, H, D]
    key_ptr,  # [num_blocks, BLOCK_SIZE, HK, D]
    value_ptr,  # [num_blocks, BLOCK_SIZE, HK, D]
    table_ptr,  # [R, B]
    prefix_row_ptr,  # [1]
    prefix_len_ptr,  # [1]
    partials_ptr,  # [S, HK, shares, GROUP, D]
    log_sums_ptr,  # [S, HK, shares, GROUP]
    kv_scales_ptr,  # [2] or None
    scale,
    num_seqs,
    num_splits,
    QUERY_STRIDE_TOKEN: tl.constexpr,
    QUERY_STRIDE_HEAD: tl.constexpr,
    KEY_STRIDE_BLOCK: tl.constexpr,
    KEY_STRIDE_SLOT: tl.constexpr,
    KEY_STRIDE_HEAD: tl.constexpr,
    VALUE_STRIDE_BLOCK: tl.constexpr,
    VALUE_STRIDE_SLOT: tl.constexpr,
    VALUE_STRIDE_HEAD: tl.constexpr,
    TABLE_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    kv_head = tl.program_id(0)
    split = tl.program_id(2)
    prefix_splits = tl.num_programs(2)
    prefix_len = tl.load(prefix_len_ptr)
    share = share_of(prefix_len, prefix_splits, BLOCK_N)
    begin = split * share
    if begin >= prefix_len:
        return
    end = tl.minimum(begin + share, prefix_len)
    lanes = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    requests = (lanes // GROUP).to(tl.int64)
    in_tile = (requests < num_seqs)[:, None] & (dims < HEAD_DIM)[None, :]
    query_rows = requests * QUERY_STRIDE_TOKEN + (kv_head * GROUP + lanes % GROUP) * QUERY_STRIDE_HEAD
    query = as_operand(
        tl.load(query_ptr + query_rows[:, None] + dims[None, :], mask=in_tile, other=0.0), key_ptr
    )
    scale, value_scale = scales_of(scale, kv_scales_ptr)

    # Every row sees all of the prefix.
    positions = tl.full([BLOCK_M], 0, tl.int32) + (end - 1)
    highest = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    key_ptr += kv_head * KEY_STRIDE_HEAD
    value_ptr += kv_head * VALUE_STRIDE_HEAD
    table_ptr += tl.load(prefix_row_ptr).to(tl.int64) * TABLE_STRIDE
    full_end = end // BLOCK_N * BLOCK_N
    # fmt: off
    acc, total, highest = attend_tiles(
        acc, total, highest, query, positions, None, key_ptr, value_ptr, table_ptr,
        begin, full_end, 0, end, scale, 0,
        KEY_STRIDE_BLOCK, KEY_STRIDE_SLOT, VALUE_STRIDE_BLOCK, VALUE_STRIDE_SLOT,
        BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, False, SOFT_CAP, False,
    )
    acc, total, highest = attend_tiles(
        acc, total, highest, query, positions, None, key_ptr, value_ptr, table_ptr,
        full_end, end, 0, end, scale, 0,
        KEY_STRIDE_BLOCK, KEY_STRIDE_SLOT, VALUE_STRIDE_BLOCK, VALUE_STRIDE_SLOT,
        BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, False, SOFT_CAP, True,
    )
    # fmt: on
    rows = ((requests * tl.num_programs(0) + kv_head) * (prefix_splits + num_splits) + split) * GROUP
    rows += lanes % GROUP
    tl.store(
        partials_ptr + rows[:, None] * HEAD_DIM + dims[None, :],
        acc / total[:, None] * value_scale,
        mask=in_tile,
    )
    tl.store(log_sums_ptr + rows, highest + tl.log2(total), mask=requests < num_seqs)
