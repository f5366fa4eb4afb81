"""One token for each row of logits: greedy, drawn, or drawn from what min_p, top_k and top_p keep.

Two kernels, whatever the rows ask for, so that they may be captured in a CUDA graph. The first reads the
logits once and leaves, per chunk of a row, the largest logit, its id and the sum of the weights exp((logit -
largest) / temperature); for rows with filters also the largest logit of each group of 128. The second takes a
row per program:

- greedy: the largest of the chunks' largest;
- without filters: the chunk, then the group, then the token at which the cumulative weight passes the draw;
- with filters: whatever is kept are the largest logits, so that one number describes it: the smallest logit
  kept (and how many of those equal to it). The groups' largest logits give a bound below it that is close for
  the peaked distributions of language models: the k-th largest of them, or the one down to which they alone
  hold top_p of the weight. Only groups that reach the bound are read again, with three pivots a pass
  bisecting the integer image of the logits.

Nothing depends on other rows, and no sum on the order in which programs run: a row gives the same token
bitwise in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.launch import overlap_options, settle_keys, wait_for_previous
from engine.kernels.sampling.ordering import (
    BELOW_ALL_KEYS,
    KEY_SHIFT,
    NEGATIVE_INFINITY_KEY,
    key_value,
    order_key,
    pick,
)

GROUP = 128
CHUNK = 8192
# Groups that one iteration of a filtered row's passes reads.
TILE_GROUPS = 32
REDUCE_WARPS, CHOOSE_WARPS = 8, 16
# May be parts of a larger array, whose alignment must not matter to a compiler.
COLUMNS = ["temperature", "top_k", "top_p", "min_p", "draw", "rows", "positions", "index", "slot"]
# Two programs of the second kernel share a multiprocessor, so that 256 rows run at once on one chip.
CHOOSE_REGISTERS = 64


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """What each entry of a step samples with; device arrays of the same length, at least S.

    Attributes:
        temperature: fp32; 0 takes the largest logit.
        top_k: int32; 0 keeps all.
        top_p, min_p: fp32; 1 and 0 keep all.
        draw: fp64 in (0, 1), the uniform number of (seed, position).
        rows: int32, the persistent row that the token is appended to; -1 for padding, which costs nothing.
        positions: int32, where in its sequence the token goes.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    draw: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True, slots=True)
class SamplingWorkspace:
    """What the first kernel leaves to the second; no content outlives a call.

    Attributes:
        chunk_max, chunk_sum: [S, chunks] fp32.
        chunk_argmax: [S, chunks] int32.
        group_max, group_mass: [S, groups] fp32.
        group_list, group_ties: [S, groups] int32.
    """

    chunk_max: torch.Tensor
    chunk_sum: torch.Tensor
    chunk_argmax: torch.Tensor
    group_max: torch.Tensor
    group_mass: torch.Tensor
    group_list: torch.Tensor
    group_ties: torch.Tensor

    @classmethod
    def allocate(cls, max_rows: int, vocab_size: int, device: torch.device | str) -> SamplingWorkspace:
        """For up to `max_rows` rows of logits; about 20 KB a row at a vocabulary of 152k."""

        def array(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty((max_rows, triton.cdiv(vocab_size, width)), dtype=dtype, device=device)

        return cls(
            chunk_max=array(CHUNK, torch.float32),
            chunk_sum=array(CHUNK, torch.float32),
            chunk_argmax=array(CHUNK, torch.int32),
            group_max=array(GROUP, torch.float32),
            group_mass=array(GROUP, torch.float32),
            group_list=array(GROUP, torch.int32),
            group_ties=array(GROUP, torch.int32),
        )


def sample_rows(
    logits: torch.Tensor,
    *,
    columns: SamplingColumns,
    token_ids: torch.Tensor,
    out_token_ids: torch.Tensor,
    out_largest: torch.Tensor | None,
    slot: torch.Tensor,
    workspace: SamplingWorkspace,
    index: torch.Tensor | None = None,
    append: bool = True,
) -> None:
    """Chooses a token for each row of logits, appends it to its request's row and to a result buffer.

    Args:
        logits: [S, vocab] bf16, fp16 or fp32; rows may be strided.
        columns: of the step's entries.
        token_ids: every persistent row's tokens, [R, max_model_len] int32; written at [rows, positions].
        out_token_ids: [num_slots, S_max] int32; written at [slot, entry].
        out_largest: [num_slots, S_max] fp32; the row's largest logit, not finite exactly where the logits
            hold a NaN or an infinity, or nothing finite, and the token (always a valid id) means nothing.
            None leaves what an earlier call wrote.
        slot: int32 [1], the result buffer of this step.
        workspace: for at least S rows of this vocabulary.
        index: int32 [S], which entry of the step each row of logits belongs to, -1 for none. Without it row
            i is entry i.
        append: without it the token goes to the result buffer alone.
    """
    num_rows, vocab_size = logits.shape
    if num_rows == 0:
        return
    num_chunks, num_groups = triton.cdiv(vocab_size, CHUNK), triton.cdiv(vocab_size, GROUP)
    has_index = index is not None
    entry = index if has_index else columns.rows
    _reduce_chunks[(num_chunks, num_rows)](
        logits,
        logits.stride(0),
        columns.temperature,
        columns.top_k,
        columns.top_p,
        columns.min_p,
        columns.rows,
        entry,
        workspace.chunk_max,
        workspace.chunk_sum,
        workspace.chunk_argmax,
        workspace.group_max,
        VOCAB=vocab_size,
        NUM_CHUNKS=num_chunks,
        NUM_GROUPS=num_groups,
        CHUNK=CHUNK,
        GROUP=GROUP,
        HAS_INDEX=has_index,
        num_warps=REDUCE_WARPS,
        **overlap_options(),
    )
    _choose_tokens[(num_rows,)](
        logits,
        logits.stride(0),
        columns.temperature,
        columns.top_k,
        columns.top_p,
        columns.min_p,
        columns.draw,
        columns.rows,
        columns.positions,
        entry,
        workspace.chunk_max,
        workspace.chunk_sum,
        workspace.chunk_argmax,
        workspace.group_max,
        workspace.group_mass,
        workspace.group_list,
        workspace.group_ties,
        token_ids,
        token_ids.stride(0),
        out_token_ids,
        out_token_ids if out_largest is None else out_largest,
        out_token_ids.stride(0),
        slot,
        VOCAB=vocab_size,
        NUM_CHUNKS=num_chunks,
        CHUNKS_PADDED=triton.next_power_of_2(num_chunks),
        NUM_GROUPS=num_groups,
        GROUPS_PADDED=triton.next_power_of_2(num_groups),
        CHUNK=CHUNK,
        GROUP=GROUP,
        TILE_GROUPS=TILE_GROUPS,
        SHIFT=KEY_SHIFT[logits.dtype],
        HAS_INDEX=has_index,
        HAS_LARGEST=out_largest is not None,
        APPEND=append,
        num_warps=CHOOSE_WARPS,
        maxnreg=CHOOSE_REGISTERS,
        **overlap_options(),
    )


@triton.jit
def _inverse(temperature):
    # Finite, so that the difference of 0 that the largest logit has stays 0 at any temperature.
    return tl.minimum(1.0 / temperature, 3.0e38)


@triton.jit(do_not_specialize_on_alignment=COLUMNS)
def _reduce_chunks(
    logits,
    logits_stride,
    temperature,
    top_k,
    top_p,
    min_p,
    rows,
    index,
    chunk_max,
    chunk_sum,
    chunk_argmax,
    group_max,
    VOCAB: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (c, i): the largest logit, its id and the weights' sum of chunk c of row i."""
    wait_for_previous(OVERLAP)
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    entry = row
    if HAS_INDEX:
        entry = tl.load(index + row).to(tl.int64)
        if entry < 0:
            return
    if tl.load(rows + entry) < 0:
        return
    heat = tl.load(temperature + entry)
    group = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
    offsets = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(logits + row * logits_stride + offsets, mask=offsets < VOCAB, other=-float("inf"))
    x = x.to(tl.float32)
    # Comparisons skip a NaN; an infinity marks the row as well.
    x = tl.where(x != x, float("inf"), x)
    largest_of_group = tl.max(x, 1)
    largest = tl.max(largest_of_group, 0)
    argmax = tl.min(tl.min(tl.where(x == largest, offsets, VOCAB), 1), 0)
    place = row * NUM_CHUNKS + chunk
    tl.store(chunk_max + place, largest)
    tl.store(chunk_argmax + place, argmax)
    if heat > 0:
        # A chunk of nothing but -inf has no weight, and no largest to subtract.
        base = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)
        weights = tl.exp((x - base) * _inverse(heat))
        tl.store(chunk_sum + place, tl.sum(tl.sum(weights, 1), 0))
        filtered = (tl.load(top_k + entry) > 0) | (tl.load(top_p + entry) < 1) | (tl.load(min_p + entry) > 0)
        if filtered:
            tl.store(group_max + row * NUM_GROUPS + group, largest_of_group, mask=group < NUM_GROUPS)


@triton.jit(do_not_specialize_on_alignment=COLUMNS)
def _choose_tokens(
    logits,
    logits_stride,
    temperature,
    top_k,
    top_p,
    min_p,
    draw,
    rows,
    positions,
    index,
    chunk_max,
    chunk_sum,
    chunk_argmax,
    group_max,
    group_mass,
    group_list,
    group_ties,
    token_ids,
    token_ids_stride,
    out_token_ids,
    out_largest,
    out_stride,
    slot,
    VOCAB: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_LARGEST: tl.constexpr,
    APPEND: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program i: the token of row i, from what `_reduce_chunks` left."""
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    entry = row
    if HAS_INDEX:
        entry = tl.load(index + row).to(tl.int64)
        if entry < 0:
            return
    request = tl.load(rows + entry).to(tl.int64)
    if request < 0:
        return
    heat = tl.load(temperature + entry)
    chunk = tl.arange(0, CHUNKS_PADDED)
    in_row = chunk < NUM_CHUNKS
    maxima = tl.load(chunk_max + row * NUM_CHUNKS + chunk, mask=in_row, other=-float("inf"))
    argmax = tl.load(chunk_argmax + row * NUM_CHUNKS + chunk, mask=in_row, other=VOCAB - 1)
    largest = tl.max(maxima, 0)
    token = tl.min(tl.where(maxima == largest, argmax, VOCAB - 1), 0)
    if (heat > 0) & (largest > -float("inf")) & (largest < float("inf")):
        inverse = _inverse(heat)
        number = tl.load(draw + entry)
        sums = tl.load(chunk_sum + row * NUM_CHUNKS + chunk, mask=in_row, other=0.0)
        mass = sums.to(tl.float64) * tl.exp((maxima - largest) * inverse).to(tl.float64)
        total = tl.sum(mass, 0)
        k = tl.load(top_k + entry)
        p = tl.load(top_p + entry)
        least = tl.load(min_p + entry)
        line = logits + row * logits_stride
        if (k > 0) | (p < 1) | (least > 0):
            lists = row * NUM_GROUPS
            token = _draw_filtered(
                line,
                group_max + lists,
                group_mass + lists,
                group_list + lists,
                group_ties + lists,
                largest,
                inverse,
                total,
                number,
                k,
                p.to(tl.float64),
                least,
                VOCAB,
                NUM_GROUPS,
                GROUPS_PADDED,
                GROUP,
                TILE_GROUPS,
                SHIFT,
            )
        else:
            token = _draw_unfiltered(
                line, mass, largest, inverse, total * number, VOCAB, CHUNKS_PADDED, CHUNK, GROUP, SHIFT
            )
    place = tl.load(slot).to(tl.int64) * out_stride + entry
    tl.store(out_token_ids + place, token)
    if HAS_LARGEST:
        tl.store(out_largest + place, largest)
    if APPEND:
        tl.store(token_ids + request * token_ids_stride + tl.load(positions + entry), token)


@triton.jit
def _draw_unfiltered(
    line,
    mass,
    largest,
    inverse,
    target,
    VOCAB: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """The token at which the cumulative weight passes the target, given the chunks' weights, fp64."""
    GROUPS: tl.constexpr = CHUNK // GROUP
    chunk, target = pick(mass, target, CHUNKS_PADDED)
    group = chunk * GROUPS + tl.arange(0, GROUPS)
    offsets = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(line + offsets, mask=offsets < VOCAB, other=-float("inf")).to(tl.float32)
    group_mass = tl.sum(tl.exp((x - largest) * inverse), 1).to(tl.float64)
    chosen, target = pick(group_mass, target, GROUPS)
    return _pick_in_group(
        line, chunk * GROUPS + chosen, target, largest, inverse, BELOW_ALL_KEYS, 0, VOCAB, GROUP, SHIFT
    )


@triton.jit
def _pick_in_group(
    line,
    group,
    target,
    largest,
    inverse,
    threshold,
    room,
    VOCAB: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """The token of one group: those above the threshold count, and the first `room` of those equal to it."""
    offsets = group * GROUP + tl.arange(0, GROUP)
    x = tl.load(line + offsets, mask=offsets < VOCAB, other=-float("inf")).to(tl.float32)
    key = order_key(x, SHIFT)
    tied = key == threshold
    kept = (key > threshold) | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))
    mass = tl.where(kept, tl.exp((x - largest) * inverse), 0.0).to(tl.float64)
    chosen, _ = pick(mass, target, GROUP)
    return group * GROUP + chosen


@triton.jit
def _draw_filtered(
    line,
    group_max,
    group_mass,
    group_list,
    group_ties,
    largest,
    inverse,
    total,
    draw,
    top_k,
    top_p,
    min_p,
    VOCAB: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """The token drawn from what the filters keep. `total` is the weight of the whole row, fp64."""
    top = order_key(largest, SHIFT)
    top_k = tl.where(top_k < VOCAB, top_k, 0)
    group = tl.arange(0, GROUPS_PADDED)
    maxima = tl.load(group_max + group, mask=group < NUM_GROUPS, other=-float("inf"))
    keys = tl.where(group < NUM_GROUPS, order_key(maxima, SHIFT), BELOW_ALL_KEYS)

    # No token under `lowest` can be kept, nor is it needed to tell what is.
    lowest = tl.full((), NEGATIVE_INFINITY_KEY >> SHIFT, tl.int32)
    if min_p > 0:
        lowest = _min_p_key(min_p, lowest, top, largest, inverse, SHIFT)
    if top_k > 0:
        if top_k <= NUM_GROUPS:
            ones = tl.full((GROUPS_PADDED,), 1.0, tl.float32)
            lowest = tl.maximum(lowest, _bound(keys, ones, top_k.to(tl.float64), lowest, top))
    elif (min_p <= 0) & (top_p < 1):
        weights = tl.exp((maxima - largest) * inverse)
        lowest = tl.maximum(lowest, _bound(keys, weights, top_p * total, lowest, top))

    active = keys >= lowest
    num_active = tl.sum(active.to(tl.int32), 0)
    tl.store(group_list + tl.cumsum(active.to(tl.int32), 0) - 1, group, mask=active)
    tl.debug_barrier()

    # Tokens above the threshold are kept, and the first `room` of those equal to it.
    threshold = lowest - 1
    room = tl.full((), 0, tl.int32)
    if top_k > 0:
        threshold, above = _search(
            line, group_list, num_active, largest, inverse, lowest - 1, top, top_k.to(tl.float64), False,
            VOCAB, GROUP, TILE_GROUPS, SHIFT,
        )  # fmt: skip
        # Where fewer than top_k are left, the threshold stays under them all.
        room = tl.where(threshold < lowest, 0, top_k - above.to(tl.int32))
    if top_p < 1:
        if (top_k > 0) | (min_p > 0):
            total, _, _ = _sums_from(
                line, group_list, num_active, largest, inverse, threshold + 1, top, top, True,
                VOCAB, GROUP, TILE_GROUPS, SHIFT,
            )  # fmt: skip
            total += room * _tie_weight(threshold, room, largest, inverse, SHIFT)
        target = top_p * total
        nucleus, above = _search(
            line, group_list, num_active, largest, inverse, threshold, top, target, True,
            VOCAB, GROUP, TILE_GROUPS, SHIFT,
        )  # fmt: skip
        needed = _num_needed(target - above, _tie_weight(nucleus, 1, largest, inverse, SHIFT))
        room = tl.where(nucleus == threshold, tl.minimum(room, needed), needed)
        threshold = nucleus

    return _draw_above(
        line, group_mass, group_list, group_ties, num_active, largest, inverse, draw, threshold, room,
        VOCAB, GROUPS_PADDED, GROUP, TILE_GROUPS, SHIFT,
    )  # fmt: skip


@triton.jit
def _min_p_key(min_p, lowest, top, largest, inverse, SHIFT: tl.constexpr):
    """The smallest key whose weight is at least min_p."""
    # The logarithm decides, not the weight: near 1 many logits share a weight. Rounded up to fp32.
    exact = tl.log(min_p.to(tl.float64))
    limit = exact.to(tl.float32)
    bits = limit.to(tl.int32, bitcast=True)
    limit = tl.where(limit.to(tl.float64) < exact, (bits - 1).to(tl.float32, bitcast=True), limit)
    low = lowest.to(tl.int64)
    high = top.to(tl.int64)
    while low < high:
        middle = low + (high - low) // 2
        if (key_value(middle.to(tl.int32), SHIFT) - largest) * inverse >= limit:
            high = middle
        else:
            low = middle + 1
    return low.to(tl.int32)


@triton.jit
def _bound(keys, values, target, lowest, top):
    """The largest key such that the groups that reach it have values of at least the target, or `lowest`."""
    low = lowest.to(tl.int64)
    high = top.to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        if tl.sum(tl.where(keys >= middle.to(tl.int32), values, 0.0), 0).to(tl.float64) >= target:
            low = middle
        else:
            high = middle - 1
    return low.to(tl.int32)


@triton.jit
def _tie_weight(key, room, largest, inverse, SHIFT: tl.constexpr):
    """The weight of a logit, fp64; 0 where nothing has room, since the key may then be no logit's."""
    key = tl.maximum(key, NEGATIVE_INFINITY_KEY >> SHIFT)
    weight = tl.exp((key_value(key, SHIFT) - largest) * inverse)
    return tl.where(room > 0, weight, 0.0).to(tl.float64)


@triton.jit
def _num_needed(missing, weight):
    """How many tokens of this weight it takes to cover the missing mass: at least 1; fp64."""
    quotient = missing / tl.maximum(weight, 1e-300)
    needed = tl.minimum(tl.maximum(quotient, 1.0), 1.0e9).to(tl.int32)
    return needed + (needed * weight < missing).to(tl.int32)


@triton.jit
def _search(
    line,
    group_list,
    num_active,
    largest,
    inverse,
    low,
    high,
    target,
    WEIGHTED: tl.constexpr,
    VOCAB: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """The largest key of [low, high] from which on weights, or counts, reach the target; else `low`.

    Returns:
        (key, int32; the sum over the keys above it, fp64).
    """
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    above = tl.full((), 0.0, tl.float64)
    while low < high:
        span = high - low
        first = low + (span + 3) // 4
        second = low + (span + 1) // 2
        third = low + (3 * span + 3) // 4
        from_first, from_second, from_third = _sums_from(
            line, group_list, num_active, largest, inverse,
            first.to(tl.int32), second.to(tl.int32), third.to(tl.int32), WEIGHTED,
            VOCAB, GROUP, TILE_GROUPS, SHIFT,
        )  # fmt: skip
        if from_third >= target:
            low = third
        elif from_second >= target:
            low = second
            high = third - 1
            above = from_third
        elif from_first >= target:
            low = first
            high = second - 1
            above = from_second
        else:
            high = first - 1
            above = from_first
    return low.to(tl.int32), above


@triton.jit
def _sums_from(
    line,
    group_list,
    num_active,
    largest,
    inverse,
    first,
    second,
    third,
    WEIGHTED: tl.constexpr,
    VOCAB: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Of the listed groups, the weights (or the count) of logits from each of three keys on; fp64."""
    from_first = tl.zeros((TILE_GROUPS, GROUP), tl.float32)
    from_second = tl.zeros((TILE_GROUPS, GROUP), tl.float32)
    from_third = tl.zeros((TILE_GROUPS, GROUP), tl.float32)
    for begin in range(0, num_active, TILE_GROUPS):
        x = _load_groups(line, group_list, begin, num_active, VOCAB, GROUP, TILE_GROUPS)
        key = order_key(x, SHIFT)
        value = tl.full((TILE_GROUPS, GROUP), 1.0, tl.float32)
        if WEIGHTED:
            value = tl.exp((x - largest) * inverse)
        from_first += tl.where(key >= first, value, 0.0)
        from_second += tl.where(key >= second, value, 0.0)
        from_third += tl.where(key >= third, value, 0.0)
    return _sum_tile(from_first), _sum_tile(from_second), _sum_tile(from_third)


@triton.jit
def _sum_tile(tile):
    return tl.sum(tl.sum(tile, 1).to(tl.float64), 0)


@triton.jit
def _load_groups(
    line, group_list, begin, num_active,
    VOCAB: tl.constexpr, GROUP: tl.constexpr, TILE_GROUPS: tl.constexpr,
):  # fmt: skip
    """Logits of the listed groups from `begin` on, [TILE_GROUPS, GROUP] fp32; -inf past the end."""
    place = begin + tl.arange(0, TILE_GROUPS)
    group = tl.load(group_list + place, mask=place < num_active, other=VOCAB // GROUP + 1)
    offsets = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    return tl.load(line + offsets, mask=offsets < VOCAB, other=-float("inf")).to(tl.float32)


@triton.jit
def _draw_above(
    line,
    group_mass,
    group_list,
    group_ties,
    num_active,
    largest,
    inverse,
    draw,
    threshold,
    room,
    VOCAB: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """The token drawn from those above the threshold and the first `room` equal to it."""
    for begin in range(0, num_active, TILE_GROUPS):
        x = _load_groups(line, group_list, begin, num_active, VOCAB, GROUP, TILE_GROUPS)
        key = order_key(x, SHIFT)
        place = begin + tl.arange(0, TILE_GROUPS)
        weights = tl.where(key > threshold, tl.exp((x - largest) * inverse), 0.0)
        tl.store(group_mass + place, tl.sum(weights, 1), mask=place < num_active)
        tl.store(group_ties + place, tl.sum((key == threshold).to(tl.int32), 1), mask=place < num_active)
    tl.debug_barrier()
    place = tl.arange(0, GROUPS_PADDED)
    mass = tl.load(group_mass + place, mask=place < num_active, other=0.0).to(tl.float64)
    ties = tl.load(group_ties + place, mask=place < num_active, other=0)
    # Room goes to the lowest ids first, and groups are listed in their order.
    kept_ties = tl.minimum(tl.maximum(room - (tl.cumsum(ties, 0) - ties), 0), ties)
    mass += kept_ties * _tie_weight(threshold, room, largest, inverse, SHIFT)
    chosen, target = pick(mass, draw * tl.sum(mass, 0), GROUPS_PADDED)
    kept_here = tl.sum(tl.where(place == chosen, kept_ties, 0), 0)
    group = tl.load(group_list + chosen)
    return _pick_in_group(line, group, target, largest, inverse, threshold, kept_here, VOCAB, GROUP, SHIFT)


settle_keys(_inverse, order_key, key_value, pick, _sum_tile, _sums_from, _load_groups, _bound, _tie_weight)
settle_keys(_num_needed, _min_p_key, _search, _draw_above, _pick_in_group, _draw_unfiltered, _draw_filtered)
