"""A step's inputs, made on the device from persistent rows: nothing here waits for the host or tells it.

A step is a few launches: `scatter_words` patches the rows with what the scheduler sent, `prepare_decodes`
and `prepare_chunks` lay out the tokens and count those that the step will append, `fill_group_slots` finds
their slots in further KV groups, where there are any, and `embed` looks the tokens up.
Where a row ends is known here alone: a decode starts at the last token of its row, whatever the host has
seen of it. Padding (row -1) reads nothing and writes token 0 at position 0 with slot -1, so that it is
harmless and cheap further on.

Arrays of a step may begin anywhere in a buffer, so kernels that load single words do not specialise on how
pointers are aligned: that would compile them anew in the middle of serving.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from engine.kernels.launch import overlap_options, wait_for_previous

if TYPE_CHECKING:  # needed for annotations alone, and much slower to import than Triton is to compile
    import torch

_DECODE_BLOCK = 128
_CHUNK_BLOCK = 512
_SCATTER_BLOCK = 512
_OUTPUTS = ["input_ids", "positions", "slot_mapping", "seq_lens"]


@triton.jit
def _fill_tokens(
    token,  # [BLOCK] where to write
    position,  # [BLOCK] of each token in its sequence
    row,  # [] or [BLOCK]
    mask,  # [BLOCK] tokens to write
    real,  # [BLOCK] those of them that are no padding
    token_ids,
    block_table,
    token_ids_stride,
    block_table_stride,
    input_ids,
    positions,
    slot_mapping,
    BLOCK_SIZE: tl.constexpr,
):
    """Writes input id, position and slot of tokens."""
    token_id = tl.load(token_ids + row.to(tl.int64) * token_ids_stride + position, mask=real, other=0)
    entry = block_table + row.to(tl.int64) * block_table_stride + position // BLOCK_SIZE
    # In the mapping's own type: it is what holds the largest slot.
    block_id = tl.load(entry, mask=real, other=0).to(slot_mapping.dtype.element_ty)
    slot = tl.where(real, block_id * BLOCK_SIZE + position % BLOCK_SIZE, -1)
    tl.store(input_ids + token, token_id, mask=mask)
    tl.store(positions + token, tl.where(real, position, 0), mask=mask)
    tl.store(slot_mapping + token, slot, mask=mask)


@triton.jit(
    do_not_specialize=["num_requests"],
    do_not_specialize_on_alignment=["rows", "lengths", *_OUTPUTS],
)
def decodes_kernel(
    rows,
    lengths,
    token_ids,
    block_table,
    input_ids,
    positions,
    slot_mapping,
    seq_lens,
    num_requests,
    token_ids_stride,
    block_table_stride,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Request i has one token, token i: the last of its row, behind which it appends one."""
    wait_for_previous(OVERLAP)
    request = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = request < num_requests
    row = tl.load(rows + request, mask=mask, other=-1)
    real = row >= 0
    length = tl.load(lengths + row, mask=real, other=0)
    tl.store(seq_lens + request, length, mask=mask)
    tl.store(lengths + row, length + 1, mask=real)
    _fill_tokens(
        request, length - 1, row, mask, real, token_ids, block_table, token_ids_stride, block_table_stride,
        input_ids, positions, slot_mapping, BLOCK_SIZE,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["num_requests", "num_tokens", "request_offset"],
    do_not_specialize_on_alignment=[
        "rows",
        "starts",
        "query_start_loc",
        "sampling_rows",
        "lengths",
        *_OUTPUTS,
    ],
)
def chunks_kernel(
    rows,
    starts,
    query_start_loc,
    sampling_rows,
    lengths,
    token_ids,
    block_table,
    input_ids,
    positions,
    slot_mapping,
    seq_lens,
    num_requests,
    num_tokens,
    request_offset,
    token_ids_stride,
    block_table_stride,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs (i, *) share the tokens of request i; the last i, those that no request fills."""
    request = tl.program_id(0)
    begin = tl.load(query_start_loc + request)
    if request < num_requests:
        row = tl.load(rows + request)
        start = tl.load(starts + request)
        end = tl.load(query_start_loc + request + 1)
        if tl.program_id(1) == 0:
            last = start + end - begin
            tl.store(seq_lens + request_offset + request, tl.where(row >= 0, last, 0))
            sampling_row = tl.load(sampling_rows + request)
            tl.store(lengths + sampling_row, last + 1, mask=sampling_row >= 0)
    else:
        row = -1
        start = 0
        end = num_tokens
    real_end = tl.where(row >= 0, end, begin)
    for first in range(begin + tl.program_id(1) * BLOCK, end, tl.num_programs(1) * BLOCK):
        token = first + tl.arange(0, BLOCK)
        _fill_tokens(
            token, start + token - begin, row, token < end, token < real_end,
            token_ids, block_table, token_ids_stride, block_table_stride,
            input_ids, positions, slot_mapping, BLOCK_SIZE,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["num_decodes", "num_requests", "num_tokens", "num_halvings"],
    do_not_specialize_on_alignment=["rows", "query_start_loc", "positions", "slot_mappings"],
)
def group_slots_kernel(
    rows,
    query_start_loc,
    positions,
    block_tables,
    slot_mappings,
    num_decodes,
    num_requests,
    num_tokens,
    num_halvings,
    table_stride_group,
    table_stride_row,
    mapping_stride,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (t, g) finds the slots of a block of tokens in table g. A decode's request has the number of
    its token; that of any other token is searched by halving."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = token < num_tokens
    is_decode = token < num_decodes
    request = tl.where(is_decode, token, num_decodes)
    end = tl.where(is_decode, token, num_requests)
    for _ in range(num_halvings):
        searching = request < end
        middle = (request + end) // 2
        first_behind = tl.load(query_start_loc + middle + 1, mask=mask & searching, other=0)
        request = tl.where(searching & (first_behind <= token), middle + 1, request)
        end = tl.where(searching & (first_behind > token), middle, end)
    row = tl.load(rows + request, mask=mask & (request < num_requests), other=-1)
    real = row >= 0
    position = tl.load(positions + token, mask=real, other=0)
    group = tl.program_id(1).to(tl.int64)
    entry = block_tables + group * table_stride_group + row.to(tl.int64) * table_stride_row
    block_id = tl.load(entry + position // BLOCK_SIZE, mask=real, other=0).to(slot_mappings.dtype.element_ty)
    slot = tl.where(real, block_id * BLOCK_SIZE + position % BLOCK_SIZE, -1)
    tl.store(slot_mappings + group * mapping_stride + token, slot, mask=mask)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["index", "value"])
def scatter_words_kernel(arena, index, value, count, BLOCK: tl.constexpr):
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = k < count
    target = tl.load(index + k, mask=mask, other=-1)
    tl.store(arena + target, tl.load(value + k, mask=mask, other=0), mask=target >= 0)


@triton.jit(do_not_specialize_on_alignment=["input_ids"])
def embed_kernel(
    input_ids,
    weight,
    out,
    weight_stride,
    out_stride,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program copies one token's row."""
    wait_for_previous(OVERLAP)
    token = tl.program_id(0)
    row = tl.load(input_ids + token).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < N
    values = tl.load(weight + row * weight_stride + column, mask=mask)
    tl.store(out + token.to(tl.int64) * out_stride + column, values, mask=mask)


def prepare_decodes(
    rows: torch.Tensor,
    lengths: torch.Tensor,
    token_ids: torch.Tensor,
    block_table: torch.Tensor,
    *,
    block_size: int,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    """Lays out requests that compute the last token of their row and append one: token i is request i's.

    Args:
        rows: [S] int32; a row of -1 is padding.
        lengths: [R] int32, tokens of each row; of those in `rows`, one more afterwards.
        token_ids: [R, L] int32; rows may be strided, here and below.
        block_table: [R, B] int32 block ids.
        input_ids, positions, seq_lens: int32, their first S entries are written.
        slot_mapping: int32 or int64, the same.
    """
    num_requests = rows.shape[0]
    if num_requests == 0:
        return
    decodes_kernel[(-(-num_requests // _DECODE_BLOCK),)](
        rows,
        lengths,
        token_ids,
        block_table,
        input_ids,
        positions,
        slot_mapping,
        seq_lens,
        num_requests,
        token_ids.stride(0),
        block_table.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK=_DECODE_BLOCK,
        num_warps=4,
        **overlap_options(),
    )


def prepare_chunks(
    rows: torch.Tensor,
    starts: torch.Tensor,
    query_start_loc: torch.Tensor,
    sampling_rows: torch.Tensor,
    lengths: torch.Tensor,
    token_ids: torch.Tensor,
    block_table: torch.Tensor,
    *,
    block_size: int,
    num_tokens: int,
    max_count: int,
    request_offset: int = 0,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    """Lays out requests that compute any number of tokens, and pads what is behind the last of them.

    Request i computes positions starts[i] and on; its tokens are query_start_loc[i] up to
    query_start_loc[i + 1], and those from query_start_loc[N] up to `num_tokens` are padding.

    Args:
        rows, starts: [N] int32; a row of -1 is padding, and so are its tokens.
        query_start_loc: [N + 1] int32, ascending.
        sampling_rows: [N] int32; the row that appends a token behind those of the request, or -1.
        lengths: [R] int32, tokens of each row; of those in `sampling_rows`, what they are afterwards.
        token_ids: [R, L] int32.
        block_table: [R, B] int32 block ids.
        num_tokens: where padding ends.
        max_count: about the most tokens of one request: it sets the launch's width, not what is right.
        request_offset: what to add to a request's number to find its place in seq_lens.
        seq_lens: int32, written at those places.
        input_ids, positions: int32, written from token query_start_loc[0] on.
        slot_mapping: int32 or int64, the same.
    """
    num_requests = rows.shape[0]
    chunks_kernel[(num_requests + 1, max(-(-max_count // _CHUNK_BLOCK), 1))](
        rows,
        starts,
        query_start_loc,
        sampling_rows,
        lengths,
        token_ids,
        block_table,
        input_ids,
        positions,
        slot_mapping,
        seq_lens,
        num_requests,
        num_tokens,
        request_offset,
        token_ids.stride(0),
        block_table.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK=_CHUNK_BLOCK,
        num_warps=4,
    )


def fill_group_slots(
    rows: torch.Tensor,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    block_tables: torch.Tensor,
    *,
    block_size: int,
    num_decodes: int,
    slot_mappings: torch.Tensor,
) -> None:
    """The slots of a laid out step's tokens in further KV groups, which have block tables of their own.

    Args:
        rows: [S] int32, the row of each request; -1 is padding, and so are its tokens.
        query_start_loc: [S + 1] int32, ascending; request i has tokens query_start_loc[i] up to [i + 1], and
            those behind the last are padding.
        positions: [T] int32, each token's place in its request.
        block_tables: [G, R, B] int32 block ids; groups and rows may be strided.
        num_decodes: the first so many requests have one token each, and these are the first tokens.
        slot_mappings: [G, at least T], int32 or int64; its first T columns are written, -1 for padding.
    """
    num_requests, num_tokens = rows.shape[0], positions.shape[0]
    group_slots_kernel[(-(-num_tokens // _DECODE_BLOCK), block_tables.shape[0])](
        rows,
        query_start_loc,
        positions,
        block_tables,
        slot_mappings,
        num_decodes,
        num_requests,
        num_tokens,
        (num_requests - num_decodes).bit_length(),
        block_tables.stride(0),
        block_tables.stride(1),
        slot_mappings.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK=_DECODE_BLOCK,
        num_warps=4,
    )


def scatter_words(arena: torch.Tensor, index: torch.Tensor, value: torch.Tensor, count: int) -> None:
    """arena[index[k]] = value[k] for the first `count` words; an index of -1 is skipped.

    Args:
        arena: [W] int32, contiguous.
        index, value: int32, at least `count` of each. Equal indices need equal values.
    """
    if count == 0:
        return
    scatter_words_kernel[(-(-count // _SCATTER_BLOCK),)](
        arena, index, value, count, BLOCK=_SCATTER_BLOCK, num_warps=4
    )


def embed(input_ids: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Looks up rows of the embedding.

    Args:
        input_ids: [T] int32 or int64, each below V: they are not checked.
        weight: [V, N], channels contiguous.
        out: [T, N], written and returned. Allocated if absent.
    """
    num_tokens, width = input_ids.shape[0], weight.shape[1]
    if out is None:
        out = weight.new_empty((num_tokens, width))
    if num_tokens == 0:
        return out
    block = triton.next_power_of_2(width)
    embed_kernel[(num_tokens,)](
        input_ids,
        weight,
        out,
        weight.stride(0),
        out.stride(0),
        N=width,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 8),
        **overlap_options(),
    )
    return out
