"""Paged attention of one query token per request: bound by reading the context's keys and values once.

A program reads one key-value head of one request (or, where the batch is small, a share of that context) for
all query heads that use it. Its shares meet in the same launch: the last program of a head to finish merges
what the others left in the workspace. The arithmetic is FlashAttention's online softmax (Dao et al., 2022),
split over the context as in Flash-Decoding (Dao et al., 2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.launch import overlap_options, prefetch_lines, settle_keys, wait_for_previous

LOG2_E = tl.constexpr(math.log2(math.e))
# Requests times key-value heads from which on other tiles are faster; see `decode_config`.
_SOME_PROGRAMS, _SEVERAL_PROGRAMS, _MANY_PROGRAMS = 128, 256, 1024
# Up to here, with nothing else to fill the device, the smallest shares are worth merging.
_FEW_PROGRAMS = 16
# More shares of one context take longer to merge than they save.
_MOST_OWN_SPLITS = 16
# Programs of a launch, per multiprocessor, below which contexts are split.
_PROGRAMS_PER_SM = 2
# Of one context, a shared prefix's among them.
MAX_SPLITS = tl.constexpr(64)
# tl.dot needs 16 of each dimension: query heads that share a key-value head are padded to them, and channels.
_MIN_DOT = 16


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How one program walks its context.

    Attributes:
        block_n: tokens of a tile.
        num_stages: tiles in flight, and one more.
        min_share: tokens that a context must have for each share it is cut into.
    """

    block_n: int
    num_warps: int
    num_stages: int
    min_share: int = 1


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """Where shares of one context leave their results. One stream at a time may use it.

    A context's shares are those of a shared prefix, where there is one, and then its own.

    Attributes:
        partials: fp32, flat; outputs of shares [S, HK, shares, G, D], each normalised by itself.
        log_sums: fp32, flat; log2 of the sum of exponentials of each, [S, HK, shares, G].
        arrivals: int32, flat; shares of [S, HK] that are done. Zero between launches.
    """

    partials: torch.Tensor
    log_sums: torch.Tensor
    arrivals: torch.Tensor


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """What of each context `shared_prefix_attention` has attended to, its results being in the workspace.

    Attributes:
        lens: [S] int32, the prefix's length, or 0 for a request that does not begin with it. Shorter than
            the context of any request, padding excepted.
        num_splits: shares that the prefix was cut into.
        block_n: tokens that it was walked by.
    """

    lens: torch.Tensor
    num_splits: int
    block_n: int


def padded_head_dim(head_dim: int) -> int:
    """The channels that a kernel's tile has for a head's."""
    return max(_MIN_DOT, triton.next_power_of_2(head_dim))


def decode_config(head_dim: int, dtype: torch.dtype, num_programs: int) -> DecodeConfig:
    """The fastest of those measured, by the number of requests times key-value heads.

    Tiles are 16 KiB of keys and as many of values; with several programs on a multiprocessor, but not yet
    many waves of them, smaller ones leave more room.
    """
    tile = 16384 // (padded_head_dim(head_dim) * dtype.itemsize)

    def within(block_n: int) -> int:
        return max(16, min(128, block_n))

    if num_programs >= _MANY_PROGRAMS:
        return DecodeConfig(within(tile), num_warps=4, num_stages=3)
    if num_programs >= _SEVERAL_PROGRAMS:
        return DecodeConfig(within(tile // 2), num_warps=2, num_stages=3 if dtype.itemsize == 1 else 4)
    if num_programs >= _SOME_PROGRAMS:  # only long contexts are worth a second program
        return DecodeConfig(within(tile), num_warps=4, num_stages=3, min_share=8 * within(tile))
    # Merging two shares takes longer than reading another tile, unless most of the device has nothing to do.
    min_share = within(tile) if num_programs <= _FEW_PROGRAMS else 2 * within(tile)
    return DecodeConfig(within(tile), num_warps=2, num_stages=3, min_share=min_share)


def decode_splits(num_seqs: int, num_kv_heads: int, num_sms: int) -> int:
    """Into how many shares each context of a batch is cut so that the launch fills the device.

    Depends on the batch size alone, since contexts grow under a captured graph. Shares that a short context
    leaves empty cost next to nothing.
    """
    wanted = _PROGRAMS_PER_SM * num_sms / (num_seqs * num_kv_heads)
    return min(_MOST_OWN_SPLITS, 1 << round(math.log2(wanted))) if wanted > 1 else 1


def decode_workspace(
    max_num_seqs: int, num_heads: int, num_kv_heads: int, head_dim: int, num_sms: int, device: torch.device
) -> DecodeWorkspace:
    """A workspace for batches of up to `max_num_seqs` requests with the `decode_splits` of their sizes."""
    splits = {n: decode_splits(n, num_kv_heads, num_sms) for n in range(1, max_num_seqs + 1)}
    most = max(n * split for n, split in splits.items() if split > 1 or n == 1)
    return split_workspace(max_num_seqs, most, num_heads, num_kv_heads, head_dim, device)


def split_workspace(
    num_seqs: int, num_shares: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> DecodeWorkspace:
    """A workspace for any batch of up to `num_seqs` requests and `num_shares` = requests x splits."""
    return DecodeWorkspace(
        partials=torch.empty(num_shares * num_heads * head_dim, dtype=torch.float32, device=device),
        log_sums=torch.empty(num_shares * num_heads, dtype=torch.float32, device=device),
        arrivals=torch.zeros(num_seqs * num_kv_heads, dtype=torch.int32, device=device),
    )


def paged_decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    block_table: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    num_splits: int,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    kv_scales: torch.Tensor | None = None,
    out: torch.Tensor,
    workspace: DecodeWorkspace,
    prefix: SharedPrefix | None = None,
    config: DecodeConfig | None = None,
) -> torch.Tensor:
    """Attention of each request's newest token over its context, that token included.

    Args:
        query: [S, H, D], strided, its last dimension contiguous.
        key_cache, value_cache: [num_blocks, block_size, HK, D], strided, the last dimension contiguous;
            block_size is a power of two. Query head h attends to head h // (H / HK).
        block_table: [R, B] int32, block ids in sequence order. Neither it nor rows, seq_lens or prefix.lens
            may be written by the kernel launched just before: they are read while that may still run.
        rows: [S] int32, the row of the block table of each request.
        seq_lens: [S] int32, tokens in each context; 0 marks padding, for which zeros are written.
        scale: what scores are multiplied with, positive.
        num_splits: shares per context, MAX_SPLITS at most; see `decode_splits`.
        sliding_window: a token sees itself and this number less one before it; 0 for no limit.
        soft_cap: scaled scores s become soft_cap * tanh(s / soft_cap); 0 for no cap.
        alibi_slopes: [H] fp32, what is taken from a score for each token between key and query.
        sinks: [H], one more score of each head, of a key whose value is zero.
        kv_scales: fp32 [2], what the caches' numbers are multiplied with, keys' and values'; None for caches
            in the query's dtype. Nothing writes it while steps run.
        out: [S, H, D], as strided as the query may be.
        workspace: of at least S x (num_splits + prefix.num_splits) shares; untouched where that is S.
        prefix: what the workspace holds already of these contexts' beginnings; not with a sliding window or
            slopes.
        config: to choose between in benchmarks; by default `decode_config`.

    Returns:
        out.
    """
    num_seqs, num_heads, head_dim = query.shape
    block_size, num_kv_heads = key_cache.shape[1], key_cache.shape[2]
    group = num_heads // num_kv_heads
    assert prefix is None or (not sliding_window and alibi_slopes is None)
    config = config or decode_config(head_dim, key_cache.dtype, num_seqs * num_kv_heads)
    block_d = padded_head_dim(head_dim)
    _decode_kernel[(num_kv_heads, num_seqs, num_splits)](
        query,
        key_cache,
        value_cache,
        block_table,
        rows,
        seq_lens,
        prefix.lens if prefix else seq_lens,
        out,
        workspace.partials,
        workspace.log_sums,
        workspace.arrivals,
        alibi_slopes,
        sinks,
        kv_scales,
        scale * LOG2_E.value,
        sliding_window,
        prefix.num_splits if prefix else 0,
        config.min_share,
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
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_G=max(_MIN_DOT, triton.next_power_of_2(group)),
        BLOCK_D=block_d,
        BLOCK_N=config.block_n,
        SPLIT=num_splits > 1,
        HAS_PREFIX=prefix is not None,
        PREFIX_BLOCK_N=prefix.block_n if prefix else 0,
        HAS_WINDOW=sliding_window > 0,
        SOFT_CAP=soft_cap,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **overlap_options(),
    )
    return out


@triton.jit(do_not_specialize=["window", "prefix_splits", "min_share"])
def _decode_kernel(
    query_ptr,  # [S, H, D]
    key_ptr,  # [num_blocks, BLOCK_SIZE, HK, D]
    value_ptr,  # [num_blocks, BLOCK_SIZE, HK, D]
    table_ptr,  # [R, B]
    rows_ptr,  # [S]
    seq_lens_ptr,  # [S]
    prefix_lens_ptr,  # [S]
    out_ptr,  # [S, H, D]
    partials_ptr,  # [S, HK, shares, GROUP, D]
    log_sums_ptr,  # [S, HK, shares, GROUP]
    arrivals_ptr,  # [S, HK]
    slopes_ptr,  # [H] or None
    sinks_ptr,  # [H] or None
    kv_scales_ptr,  # [2] or None
    scale,
    window,
    prefix_splits,
    min_share,
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
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    PREFIX_BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # Heads vary fastest: programs that run together then read neighbouring parts of the same blocks.
    kv_head = tl.program_id(0)
    request = tl.program_id(1)
    split = tl.program_id(2)
    num_splits = tl.num_programs(2)
    heads = tl.arange(0, BLOCK_G)
    dims = tl.arange(0, BLOCK_D)
    in_tile = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    head_of_row = (kv_head * GROUP + heads)[:, None]
    out_ptrs = (
        out_ptr + request.to(tl.int64) * OUT_STRIDE_TOKEN + head_of_row * OUT_STRIDE_HEAD + dims[None, :]
    )

    # Made long before the kernel that this launch follows, which leaves the query and the newest token in the
    # cache. All are asked for at once, so that the first tile's addresses wait for one after the other twice.
    seq_len = tl.load(seq_lens_ptr + request, cache_modifier=".cg")
    row = tl.load(rows_ptr + request, cache_modifier=".cg").to(tl.int64)
    start = 0
    if HAS_WINDOW:
        start = tl.maximum(seq_len - window, 0)
    num_prefix_shares = 0
    if HAS_PREFIX:
        start = tl.load(prefix_lens_ptr + request, cache_modifier=".cg")
        num_prefix_shares = tl.cdiv(start, share_of(start, prefix_splits, PREFIX_BLOCK_N))
    share = tl.maximum(share_of(seq_len - start, num_splits, BLOCK_N), tl.cdiv(min_share, BLOCK_N) * BLOCK_N)
    num_shares = tl.cdiv(seq_len - start, share)
    begin = start + split * share
    end = tl.minimum(begin + share, seq_len)
    table_ptr += row * TABLE_STRIDE
    key_ptr += kv_head * KEY_STRIDE_HEAD
    value_ptr += kv_head * VALUE_STRIDE_HEAD
    tokens = begin + tl.arange(0, BLOCK_N)
    # Nothing is read of padding, nor by programs without a share: their end is not behind their begin.
    blocks = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=tokens < end, other=0, cache_modifier=".cg")
    # fmt: off
    _prefetch_tile(
        key_ptr, blocks, tokens, end, KEY_STRIDE_BLOCK, KEY_STRIDE_SLOT, BLOCK_SIZE, HEAD_DIM, OVERLAP
    )
    _prefetch_tile(
        value_ptr, blocks, tokens, end, VALUE_STRIDE_BLOCK, VALUE_STRIDE_SLOT, BLOCK_SIZE, HEAD_DIM, OVERLAP
    )
    # fmt: on
    slopes = None
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + kv_head * GROUP + heads, mask=heads < GROUP, other=0.0)
    highest = tl.full([BLOCK_G], -1e30, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    if sinks_ptr is not None:
        # The sink is in a context's first own share, which there always is.
        is_first = heads < tl.where(split == 0, GROUP, 0)
        sinks = tl.load(sinks_ptr + kv_head * GROUP + heads, mask=is_first, other=0.0).to(tl.float32)
        highest = tl.where(is_first, sinks * LOG2_E, highest)
        total = tl.where(is_first, 1.0, 0.0)
    scale, value_scale = scales_of(scale, kv_scales_ptr)
    wait_for_previous(OVERLAP)

    if seq_len == 0:
        if split == 0:
            tl.store(out_ptrs, tl.zeros([BLOCK_G, BLOCK_D], out_ptr.dtype.element_ty), mask=in_tile)
        return
    if split >= num_shares:
        return
    query_ptrs = query_ptr + request.to(tl.int64) * QUERY_STRIDE_TOKEN + head_of_row * QUERY_STRIDE_HEAD
    query = as_operand(tl.load(query_ptrs + dims[None, :], mask=in_tile, other=0.0), key_ptr)
    acc, log_sum = _attend_share(
        query,
        highest,
        total,
        key_ptr,
        value_ptr,
        table_ptr,
        blocks,
        begin,
        end,
        seq_len - 1,
        slopes,
        scale,
        KEY_STRIDE_BLOCK,
        KEY_STRIDE_SLOT,
        VALUE_STRIDE_BLOCK,
        VALUE_STRIDE_SLOT,
        BLOCK_SIZE,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_N,
        SOFT_CAP,
    )
    acc *= value_scale
    if (not SPLIT and not HAS_PREFIX) or num_prefix_shares + num_shares == 1:
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=in_tile)
    else:
        pair = request * tl.num_programs(0) + kv_head
        first_row = pair.to(tl.int64) * (prefix_splits + num_splits) * GROUP
        partials_ptr += first_row * HEAD_DIM
        log_sums_ptr += first_row
        own_rows = (prefix_splits + split) * GROUP + heads
        tl.store(partials_ptr + own_rows[:, None] * HEAD_DIM + dims[None, :], acc, mask=in_tile)
        tl.store(log_sums_ptr + own_rows, log_sum, mask=heads < GROUP)
        # Every thread's stores come before the one thread's release below, and before other threads' reads.
        tl.debug_barrier()
        arrived = num_shares - 1
        if SPLIT:
            arrived = tl.atomic_add(arrivals_ptr + pair, 1, sem="acq_rel", scope="gpu")
        if arrived == num_shares - 1:
            _merge_shares(
                partials_ptr,
                log_sums_ptr,
                out_ptr + request.to(tl.int64) * OUT_STRIDE_TOKEN + kv_head * GROUP * OUT_STRIDE_HEAD,
                num_prefix_shares,
                prefix_splits,
                num_shares,
                OUT_STRIDE_HEAD,
                GROUP,
                HEAD_DIM,
                BLOCK_D,
                MAX_SPLITS,
            )
            if SPLIT:
                tl.store(arrivals_ptr + pair, 0)


@triton.jit
def scales_of(scale, kv_scales_ptr):
    """What scores are multiplied with, and what values are."""
    value_scale = 1.0
    if kv_scales_ptr is not None:
        scale *= tl.load(kv_scales_ptr)
        value_scale = tl.load(kv_scales_ptr + 1)
    return scale, value_scale


@triton.jit
def as_operand(query, key_ptr):
    """The query in the number format of the products.

    Caches of e4m3 are multiplied in fp16, which has all of its numbers, and to which a GPU turns it in one
    instruction; sums are of fp32. That format has fewer large numbers than bf16.
    """
    if key_ptr.dtype.element_ty == tl.float8e4nv and query.dtype == tl.bfloat16:
        query = tl.minimum(tl.maximum(query.to(tl.float32), -65504.0), 65504.0).to(tl.float16)
    return query


@triton.jit
def share_of(length, num_splits, BLOCK_N: tl.constexpr):
    """Tokens in each share of a context of this length but the last: whole tiles, one at least."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, BLOCK_N), num_splits), 1) * BLOCK_N


@triton.jit
def _prefetch_tile(
    cache_ptr,
    blocks,  # [BLOCK_N]
    tokens,  # [BLOCK_N]
    end,
    STRIDE_BLOCK: tl.constexpr,
    STRIDE_SLOT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Asks for a tile of keys or values while its newest token may still be on its way to the cache."""
    LINE: tl.constexpr = 128 // (cache_ptr.dtype.element_ty.primitive_bitwidth // 8)
    LINES: tl.constexpr = triton.next_power_of_2(triton.cdiv(HEAD_DIM, LINE))
    channels = tl.arange(0, LINES)[None, :] * LINE
    offsets = blocks.to(tl.int64) * STRIDE_BLOCK + (tokens & (BLOCK_SIZE - 1)) * STRIDE_SLOT
    mask = (tokens < end)[:, None] & (channels < HEAD_DIM)
    prefetch_lines(cache_ptr + offsets[:, None] + channels, mask, OVERLAP)


@triton.jit
def final_scores(scores, scale, distances, slopes, SOFT_CAP: tl.constexpr):
    """Capped and biased scores, to the base of two like `scale`.

    Multiply-adds are fused by name, since their rounding must not depend on what the compiler finds behind
    them: see prefill.py.

    Args:
        scores: [M, N], q.k.
        distances: [1 or M, N], tokens from each key to the query.
        slopes: [M] or None.
    """
    scores *= scale
    if SOFT_CAP > 0:
        CAP: tl.constexpr = SOFT_CAP * LOG2_E
        # tanh(x) = 2 sigmoid(2 x) - 1
        scores = tl.fma(tl.sigmoid(scores * (2 / CAP)), 2 * CAP, -CAP)
    if slopes is not None:
        scores = tl.fma((slopes * -LOG2_E)[:, None], distances.to(tl.float32), scores)
    return scores


@triton.jit
def _attend_share(
    query,  # [BLOCK_G, BLOCK_D]
    highest,  # [BLOCK_G]
    total,  # [BLOCK_G]
    key_ptr,
    value_ptr,
    table_ptr,
    blocks,  # [BLOCK_N], of the first tile
    begin,
    end,
    position,
    slopes,  # [BLOCK_G] or None
    scale,
    KEY_STRIDE_BLOCK: tl.constexpr,
    KEY_STRIDE_SLOT: tl.constexpr,
    VALUE_STRIDE_BLOCK: tl.constexpr,
    VALUE_STRIDE_SLOT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """Attention over the context's tokens begin to end, at least one; (output, log2 of the sum) in fp32.

    `highest` (to the base of two) and `total` are the highest score and the sum that the softmax begins with.
    """
    FINAL: tl.constexpr = SOFT_CAP > 0 or slopes is not None
    dims = tl.arange(0, BLOCK_D)
    acc = tl.zeros([query.shape[0], BLOCK_D], tl.float32)
    # A tile's block ids are read while the tile before it is asked for, so that its addresses never wait.
    for first in range(begin, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        inside = tokens < end
        slots = tokens & (BLOCK_SIZE - 1)
        # Slots outside are not read: what is left in them may be NaN, which a weight of zero would keep.
        loaded = inside[:, None]
        if HEAD_DIM != BLOCK_D:
            loaded = loaded & (dims < HEAD_DIM)[None, :]
        key_offsets = blocks.to(tl.int64) * KEY_STRIDE_BLOCK + slots * KEY_STRIDE_SLOT
        key = tl.load(key_ptr + key_offsets[:, None] + dims[None, :], mask=loaded, other=0.0)
        value_offsets = blocks.to(tl.int64) * VALUE_STRIDE_BLOCK + slots * VALUE_STRIDE_SLOT
        value = tl.load(value_ptr + value_offsets[:, None] + dims[None, :], mask=loaded, other=0.0)
        following = tokens + BLOCK_N
        blocks = tl.load(table_ptr + following // BLOCK_SIZE, mask=following < end, other=0)

        value = value.to(query.dtype)
        scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee")
        if FINAL:
            scores = final_scores(scores, scale, (position - tokens)[None, :], slopes, SOFT_CAP)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        if FINAL:
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp2(scores - new_highest[:, None])
        else:
            new_highest = tl.maximum(highest, tl.max(scores, 1) * scale)
            weights = tl.exp2(tl.fma(scores, scale, -new_highest[:, None]))
        decay = tl.exp2(highest - new_highest)
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(value.dtype), value, acc * decay[:, None], input_precision="ieee")
        highest = new_highest
    return acc / total[:, None], highest + tl.log2(total)


@triton.jit
def _merge_shares(
    partials_ptr,  # [shares, GROUP, D]
    log_sums_ptr,  # [shares, GROUP]
    out_ptr,  # [GROUP, D]
    num_prefix_shares,
    first_own,
    num_own,
    OUT_STRIDE_HEAD: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """The output of all shares, merged in their order: the prefix's, and the own from `first_own` on."""
    BLOCK_G: tl.constexpr = triton.next_power_of_2(GROUP)
    # Shares read at once: many reads in flight, 4096 elements at most in registers.
    CHUNK: tl.constexpr = max(1, min(MAX_SPLITS, 4096 // (BLOCK_G * BLOCK_D)))
    heads = tl.arange(0, BLOCK_G)
    dims = tl.arange(0, BLOCK_D)
    in_tile = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    end = first_own + num_own
    highest = tl.full([BLOCK_G], -1e30, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for first in range(0, end, CHUNK):
        chunk = first + tl.arange(0, CHUNK)
        present = (chunk < num_prefix_shares) | ((chunk >= first_own) & (chunk < end))
        present = present[:, None] & (heads < GROUP)[None, :]
        rows = chunk[:, None] * GROUP + heads[None, :]
        log_sums = tl.load(log_sums_ptr + rows, mask=present, other=float("-inf"))
        loaded = present[:, :, None] & (dims < HEAD_DIM)[None, None, :]
        partials = tl.load(
            partials_ptr + rows[:, :, None] * HEAD_DIM + dims[None, None, :], loaded, other=0.0
        )
        new_highest = tl.maximum(highest, tl.max(log_sums, 0))
        weights = tl.exp2(log_sums - new_highest[None, :])
        decay = tl.exp2(highest - new_highest)
        total = total * decay + tl.sum(weights, 0)
        acc = acc * decay[:, None] + tl.sum(weights[:, :, None] * partials, 0)
        highest = new_highest
    out = acc / total[:, None]
    tl.store(
        out_ptr + heads[:, None] * OUT_STRIDE_HEAD + dims[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=in_tile,
    )


settle_keys(scales_of, as_operand, share_of, _prefetch_tile, final_scores, _attend_share, _merge_shares)
