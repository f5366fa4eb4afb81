"""Converts a plan to a step's columns: what each slot computes and how its token is sampled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.attention.interface import IntArray
from engine.cuda.adapters import sort_tokens
from engine.cuda.rows import DeviceRows
from engine.cuda.shared_prefix import SharedPrefix
from engine.cuda.step_shape import StepColumns, StepShape
from engine.dispatch.records import StepPlan
from engine.kernels.lora.kernel import most_tiles, tile_tokens
from engine.kernels.paged_attention.prefill import max_prefill_tiles, prefill_tiles
from engine.sampling.generator import uniforms
from engine.sampling.parameters import SamplingBatch


@dataclass(slots=True)
class StepLayout:
    """An applied plan in the order of a step's slots: decodes (requests that compute and sample one token),
    then chunks.

    Attributes:
        rows, starts, counts: row, first position and number of tokens of each request, [S].
        samples: whether the request samples a token, [S]; true for the first `num_decodes`.
        num_decodes: number of decodes.
        prefix: the prefix that decodes share, if it is worth a separate attention launch.
        adapter_slots: the slot of each request's adapter, -1 for none, [S]; None where no request has one.
        plan_index: each request's index in the plan's columns, [S].
        plan_order: the requests that sample, as indices into the slots, in the plan's order.
        num_slots: slots of each of the plan's requests that sample, one after the other; None for one each. A
            decode has one for each of its drafts, which are decodes of the same row here.
        offsets, group_sizes: which of its request's slots each is, and how many the request has, [S]; None
            where all have one.
    """

    rows: IntArray
    starts: IntArray
    counts: IntArray
    samples: np.ndarray
    num_decodes: int
    plan_order: IntArray
    plan_index: IntArray
    prefix: SharedPrefix | None = None
    num_slots: IntArray | None = None
    offsets: IntArray | None = None
    group_sizes: IntArray | None = None
    adapter_slots: IntArray | None = None

    @property
    def num_chunks(self) -> int:
        """Requests that are not decodes."""
        return len(self.rows) - self.num_decodes

    @property
    def num_chunk_tokens(self) -> int:
        """Tokens that the chunks compute."""
        return int(self.counts[self.num_decodes :].sum())


def lay_out(plan: StepPlan) -> StepLayout:
    """Makes the layout of an applied plan, with decodes first."""
    if plan.drafts is not None:
        return _lay_out_drafts(plan, plan.drafts.astype(np.int64))
    rows, starts = plan.rows.astype(np.int64), plan.starts.astype(np.int64)
    counts, samples = plan.counts.astype(np.int64), plan.samples != 0
    is_decode = samples & (counts == 1)
    num_decodes = int(is_decode.sum())
    if num_decodes == len(rows):
        order = np.arange(num_decodes)
        return StepLayout(rows, starts, counts, samples, num_decodes, order, order)
    order = np.argsort(~is_decode, kind="stable")
    slot = np.empty_like(order)
    slot[order] = np.arange(len(order))
    columns = (rows[order], starts[order], counts[order], samples[order])
    return StepLayout(*columns, num_decodes, slot[samples], order)


def _lay_out_drafts(plan: StepPlan, drafts: IntArray) -> StepLayout:
    """The layout of a plan with drafts: every draft is one more decode, behind that of its request."""
    sizes = 1 + drafts
    column = np.repeat(np.arange(len(sizes)), sizes)
    offsets = np.arange(len(column)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    samples = plan.samples[column] != 0
    is_decode = samples & (plan.counts[column] == 1)
    order = np.argsort(~is_decode, kind="stable")
    slot = np.empty_like(order)
    slot[order] = np.arange(len(order))
    column, offsets = column[order], offsets[order]
    return StepLayout(
        plan.rows[column].astype(np.int64),
        plan.starts[column].astype(np.int64) + offsets,
        plan.counts[column].astype(np.int64),
        samples[order],
        int(is_decode.sum()),
        slot[samples],
        column,
        num_slots=sizes[plan.samples != 0],
        offsets=offsets,
        group_sizes=sizes[column],
    )


def token_slots(layout: StepLayout, num_decodes: int, num_tokens: int) -> IntArray:
    """The slot of each token's adapter in a step with so many slots for decodes and tokens, -1 for none."""
    slots: IntArray = np.full(num_tokens, -1)
    if layout.adapter_slots is not None:
        d = layout.num_decodes
        slots[:d] = layout.adapter_slots[:d]
        chunks = np.repeat(layout.adapter_slots[d:], layout.counts[d:])
        slots[num_decodes : num_decodes + len(chunks)] = chunks
    return slots


def exact_shape(
    layout: StepLayout,
    block_q: int,
    *,
    tile_decodes: bool,
    speculates: bool = False,
    num_loras: int = 0,
    invariant: bool = False,
) -> StepShape:
    """The shape without padding. With `tile_decodes`, attention treats decodes as chunks of one token.

    Args:
        num_loras: slots for adapters.
        invariant: adapters' tiles have the same size in any step.
    """
    tiled = layout.counts if tile_decodes else layout.counts[layout.num_decodes :]
    return StepShape(
        layout.num_decodes,
        layout.num_chunks,
        layout.num_chunk_tokens,
        int((-(-tiled // block_q)).sum()),
        layout.prefix is not None,
        speculates,
        0
        if layout.adapter_slots is None
        else _adapter_tiles(layout.num_decodes + layout.num_chunk_tokens, num_loras, invariant=invariant),
    )


def _adapter_tiles(num_tokens: int, num_loras: int, *, invariant: bool) -> int:
    return most_tiles(num_tokens, num_loras, tile_tokens(num_tokens, invariant=invariant))


def padded_shape(
    num_decodes: int,
    num_chunks: int,
    num_chunk_tokens: int,
    block_q: int,
    *,
    tile_decodes: bool,
    shares_prefix: bool = False,
    speculates: bool = False,
    num_loras: int = 0,
    invariant: bool = False,
) -> StepShape:
    """The shape of a graph for up to this many decodes, chunks and tokens of chunks."""
    tiles = max_prefill_tiles(num_chunk_tokens, num_chunks, block_q) if num_chunks else 0
    tiles += num_decodes if tile_decodes else 0
    adapter_tiles = 0
    if num_loras:
        adapter_tiles = _adapter_tiles(num_decodes + num_chunk_tokens, num_loras, invariant=invariant)
    return StepShape(
        num_decodes, num_chunks, num_chunk_tokens, tiles, shares_prefix, speculates, adapter_tiles
    )


def fill_columns(
    columns: StepColumns[np.ndarray],
    shape: StepShape,
    layout: StepLayout,
    *,
    result: int,
    block_q: int,
    tile_decodes: bool,
) -> None:
    """Writes all columns except the sampling parameters. Slots without a request become padding."""
    columns.result[0] = result
    d, n = layout.num_decodes, layout.num_chunks
    chunks = slice(shape.num_decodes, shape.num_decodes + n)
    columns.starts[:n] = layout.starts[d:]
    columns.starts[n:] = 0
    for column, values in (
        (columns.rows, layout.rows),
        (columns.sampling_rows, np.where(layout.samples, layout.rows, -1)),
    ):
        column[d : shape.num_decodes] = -1
        column[shape.num_decodes + n :] = -1
        column[:d] = values[:d]
        column[chunks] = values[d:]
    first = columns.query_start_loc
    first[: shape.num_decodes + 1] = np.arange(shape.num_decodes + 1)
    chunk_ends = shape.num_decodes + np.cumsum(layout.counts[d:])
    first[shape.num_decodes + 1 : shape.num_decodes + 1 + n] = chunk_ends
    first[shape.num_decodes + 1 + n :] = chunk_ends[-1] if n else shape.num_decodes
    columns.logits_index[: shape.num_decodes] = np.arange(shape.num_decodes)
    columns.logits_index[chunks] = chunk_ends - 1
    columns.logits_index[shape.num_decodes + n :] = 0
    _fill_tiles(columns, shape, layout, block_q, tile_decodes)
    _fill_prefix(columns, shape, layout)


def fill_adapters(
    columns: StepColumns[np.ndarray], shape: StepShape, layout: StepLayout, *, invariant: bool
) -> None:
    """Writes the columns of adapters' tiles."""
    if not shape.num_adapter_tiles:
        return
    columns.adapter_tokens[:] = 0
    columns.adapter_slot[:] = -1
    if layout.adapter_slots is None:
        return
    slots = token_slots(layout, shape.num_decodes, shape.num_tokens)
    order, tiles = sort_tokens(slots, tile_tokens(shape.num_tokens, invariant=invariant))
    columns.adapter_tokens[: len(order)] = order
    for column, values in zip(
        (columns.adapter_slot, columns.adapter_begin, columns.adapter_end), tiles, strict=True
    ):
        column[: len(values)] = values


def _fill_prefix(columns: StepColumns[np.ndarray], shape: StepShape, layout: StepLayout) -> None:
    if not shape.shares_prefix:
        return
    prefix = layout.prefix
    columns.prefix_row[0] = prefix.row if prefix else 0
    columns.prefix_len[0] = prefix.num_tokens if prefix else 0
    columns.prefix_lens[:] = 0
    if prefix:
        columns.prefix_lens[: layout.num_decodes] = np.where(prefix.shares, prefix.num_tokens, 0)


def _fill_tiles(
    columns: StepColumns[np.ndarray], shape: StepShape, layout: StepLayout, block_q: int, tile_decodes: bool
) -> None:
    if not shape.num_tiles:
        return
    d = layout.num_decodes
    begin = 0 if tile_decodes else d
    counts = layout.counts[begin:]
    request, start = prefill_tiles(counts, layout.starts[begin:] + counts, block_q)
    request += begin
    # The chunks' slots come after the padding of the decodes.
    request[request >= d] += shape.num_decodes - d
    columns.tile_request[: len(request)] = request
    columns.tile_request[len(request) :] = -1
    columns.tile_start[: len(request)] = start
    columns.tile_start[len(request) :] = 0


def fill_drafts(
    columns: StepColumns[np.ndarray], shape: StepShape, layout: StepLayout, rows: DeviceRows
) -> None:
    """Writes the columns that steps of a worker with speculation have besides."""
    d, n = layout.num_decodes, layout.num_chunks
    chunks = slice(shape.num_decodes, shape.num_decodes + n)
    columns.offsets[:], columns.group_sizes[:], columns.room[:] = 0, 1, 0
    if layout.offsets is not None and layout.group_sizes is not None:
        columns.offsets[:d], columns.group_sizes[:d] = layout.offsets[:d], layout.group_sizes[:d]
    columns.room[:d] = rows.room(layout.rows[:d])
    seeds = rows.sampling.seeds(layout.rows)
    columns.seeds[:d], columns.seeds[chunks] = seeds[:d], seeds[d:]


def fill_sampling(
    columns: StepColumns[np.ndarray], shape: StepShape, layout: StepLayout, rows: DeviceRows
) -> SamplingBatch:
    """Writes the sampling parameters of each slot. Returns the parameters of the layout's requests, in its
    order."""
    ends = layout.starts + layout.counts
    batch = rows.sampling.select(layout.rows, ends)
    d, parameters = layout.num_decodes, batch.columns
    chunks = slice(shape.num_decodes, shape.num_decodes + layout.num_chunks)
    columns.sampling["temperature"][:] = 0  # padding is greedy
    if parameters["temperature"].any():
        draws = uniforms(parameters["seed"], ends)
        by_name = [(column, parameters[name]) for name, column in columns.sampling.items()]
        for column, values in (*by_name, (columns.draws, draws)):
            column[:d] = values[:d]
            column[chunks] = values[d:]
    return batch
