"""Draft tokens on the device, where alone it is known how far requests have come.

A decode has a slot for its row's last token and one for each draft after it, next to each other; `offsets`
says which of them a slot is. A step with drafts is: `propose_ngrams` (or another proposer) leaves the draft
that comes after each slot in `next_drafts`, -1 where none does, and puts it behind the end of its row, where
penalties see it; `prepare_slots` makes the model's inputs of them; the model computes logits and the sampler
a token in every slot, as if each were a request of its own; `accept_drafts` appends to each row the sampled
tokens up to the first that is not the draft after its slot. See `engine.speculation.accept` for why that
leaves the output as it is without drafts.

Slots whose draft was not proposed, and those of rows that have no room for another token, compute nothing and
touch nothing. As in step_inputs, arrays may begin anywhere in a buffer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_SEARCH_BLOCK = 2048
_SLOT_BLOCK = 128
MAX_SLOTS = 32
"""Slots of a request, at most."""
# SplitMix64, as in engine/sampling/generator.py.
GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
FIRST_MULTIPLIER = tl.constexpr(0xBF58476D1CE4E5B9)
SECOND_MULTIPLIER = tl.constexpr(0x94D049BB133111EB)
TEST_SEED = tl.constexpr(0x5EED)

_COLUMNS = ["rows", "offsets", "group_sizes", "room", "seeds", "draws", "next_drafts", "sampling_rows"]
_INPUTS = ["input_ids", "positions", "slot_mapping", "seq_lens", "slot_rows"]
_ARENA = ["lengths", "predictions", "prediction_lengths", "prompt_lengths"]


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * FIRST_MULTIPLIER
    x = (x ^ (x >> 27)) * SECOND_MULTIPLIER
    return x ^ (x >> 31)


@triton.jit
def _uniform(seed, position):
    """The number in (0, 1) of a seed and a position; see `engine.sampling.generator.uniforms`."""
    state = _mix(seed.to(tl.uint64) + GAMMA)
    bits = _mix(state + (position.to(tl.uint64) + 1) * GAMMA)
    return ((bits >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16


@triton.jit
def _longest_run(
    tokens, length, text, text_length, LEAST: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr
):
    """The longest run, of LEAST to MOST of the last tokens, that the text has, times 2^32, and where its
    newest place ends; 0 for none."""
    best = tl.full((BLOCK,), 0, tl.int64)
    last = tl.load(tokens + length - 1)
    for begin in range(0, text_length, BLOCK):
        end = begin + tl.arange(0, BLOCK) + 1
        going = (end <= text_length) & (tl.load(text + end - 1, mask=end <= text_length, other=-1) == last)
        run = going.to(tl.int64)
        for back in tl.static_range(1, MOST):
            going = going & (tl.minimum(end, length) > back)
            before = tl.load(tokens + tl.maximum(length - 1 - back, 0))
            going = going & (tl.load(text + end - 1 - back, mask=going, other=-1) == before)
            run += going.to(tl.int64)
        found = tl.where(run >= LEAST, (run << 32) | end.to(tl.int64), 0)
        best = tl.maximum(best, found)
    return tl.max(best, 0)


@triton.jit(do_not_specialize_on_alignment=[*_COLUMNS, *_ARENA])
def propose_kernel(
    rows,
    offsets,
    group_sizes,
    room,
    lengths,
    token_ids,
    predictions,
    prediction_lengths,
    prompt_lengths,
    next_drafts,
    token_ids_stride,
    predictions_stride,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    IS_TEST: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_SLOTS: tl.constexpr,
):
    """Program i proposes for the request whose first slot is i."""
    slot = tl.program_id(0)
    row = tl.load(rows + slot).to(tl.int64)
    if tl.load(offsets + slot) != 0:
        return
    size = tl.load(group_sizes + slot)
    place = tl.arange(0, MAX_SLOTS)
    in_group = place < size
    if (row < 0) | (size <= 1):
        tl.store(next_drafts + slot + place, tl.full((MAX_SLOTS,), -1, tl.int32), mask=place < 1)
        return
    length = tl.load(lengths + row)
    count = tl.minimum(size - 1, tl.load(room + slot) - length)
    tokens = token_ids + row * token_ids_stride
    if IS_TEST:
        source = tokens + length - 1 + 0 * place
    else:
        own = _longest_run(tokens, length, tokens, length - 1, LEAST, MOST, BLOCK)
        prediction = predictions + row * predictions_stride
        num_predicted = tl.load(prediction_lengths + row)
        predicted = tl.full((), 0, tl.int64)
        if num_predicted > 0:
            predicted = _longest_run(tokens, length, prediction, num_predicted, LEAST, MOST, BLOCK)
            # An output that is the prediction's beginning counts as a run of any length.
            num_outputs = length - tl.load(prompt_lengths + row)
            if (num_outputs > 0) & (num_outputs < MOST) & (num_outputs <= num_predicted):
                inside = place < num_outputs
                output = tl.load(tokens + length - num_outputs + place, mask=inside, other=0)
                same = tl.load(prediction + place, mask=inside, other=0) == output
                begins = tl.min(same.to(tl.int32), 0) == 1
                if begins & ((predicted >> 32) < MOST):
                    predicted = (tl.full((), MOST, tl.int64) << 32) | num_outputs.to(tl.int64)
        is_own = (predicted == 0) | ((own >> 32) > (predicted >> 32))
        end = (tl.where(is_own, own, predicted) & 0x7FFFFFFF).to(tl.int32)
        if is_own:
            count = tl.where(own == 0, 0, count)
            source = tokens + end + place % tl.maximum(length - end, 1)
        else:
            count = tl.minimum(count, num_predicted - end)
            source = prediction + end + place
    proposed = place < count
    draft = tl.load(source, mask=proposed, other=-1)
    tl.store(next_drafts + slot + place, draft, mask=in_group)
    # Nobody reads behind the row's end before it is written.
    tl.store(tokens + length + place, draft, mask=proposed)


@triton.jit(
    do_not_specialize=["num_slots", "num_decodes"],
    do_not_specialize_on_alignment=[*_COLUMNS, *_INPUTS, *_ARENA],
)
def slots_kernel(
    rows,
    offsets,
    room,
    seeds,
    next_drafts,
    lengths,
    token_ids,
    block_table,
    input_ids,
    positions,
    slot_mapping,
    seq_lens,
    slot_rows,
    draws,
    num_slots,
    num_decodes,
    token_ids_stride,
    block_table_stride,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first `num_decodes` slots are laid out; the others, chunks, get their row and no draft."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = slot < num_slots
    decodes = slot < num_decodes
    row = tl.load(rows + slot, mask=mask, other=-1).to(tl.int64)
    used = decodes & (row >= 0)
    offset = tl.load(offsets + slot, mask=decodes, other=0)
    draft = tl.load(next_drafts + slot - 1, mask=decodes & (offset > 0), other=0)
    length = tl.load(lengths + row, mask=used, other=0)
    real = used & (length <= tl.load(room + slot, mask=decodes, other=0)) & (draft >= 0)
    position = tl.where(real, length - 1 + offset, 0)
    last = tl.load(token_ids + row * token_ids_stride + position, mask=real & (offset == 0), other=0)
    entry = block_table + row * block_table_stride + position // BLOCK_SIZE
    block_id = tl.load(entry, mask=real, other=0).to(slot_mapping.dtype.element_ty)
    tl.store(input_ids + slot, tl.where(real & (offset > 0), draft, last), mask=decodes)
    tl.store(positions + slot, position, mask=decodes)
    place = tl.where(real, block_id * BLOCK_SIZE + position % BLOCK_SIZE, -1)
    tl.store(slot_mapping + slot, place, mask=decodes)
    tl.store(seq_lens + slot, tl.where(real, position + 1, 0), mask=decodes)
    tl.store(slot_rows + slot, tl.where(real | (slot >= num_decodes), row, -1).to(tl.int32), mask=mask)
    tl.store(next_drafts + slot, tl.full((BLOCK,), -1, tl.int32), mask=mask & (slot >= num_decodes))
    seed = tl.load(seeds + slot, mask=decodes, other=0)
    tl.store(draws + slot, _uniform(seed, position + 1), mask=decodes)


@triton.jit(
    do_not_specialize=["acceptance"], do_not_specialize_on_alignment=[*_COLUMNS, *_INPUTS, *_ARENA, "slot"]
)
def accept_kernel(
    sampling_rows,
    offsets,
    group_sizes,
    seq_lens,
    next_drafts,
    lengths,
    token_ids,
    out_token_ids,
    out_counts,
    out_drafts,
    out_stride,
    slot,
    token_ids_stride,
    acceptance,
    IS_TEST: tl.constexpr,
    MAX_SLOTS: tl.constexpr,
):
    """Program i: the request whose first slot is i."""
    first = tl.program_id(0)
    row = tl.load(sampling_rows + first).to(tl.int64)
    if (row < 0) | (tl.load(offsets + first) != 0):
        return
    buffer = tl.load(slot).to(tl.int64) * out_stride + first
    length = tl.load(seq_lens + first)
    count = 0
    going = length > 0
    while going:
        token = tl.load(out_token_ids + buffer + count)
        draft = tl.load(next_drafts + first + count)
        tl.store(token_ids + row * token_ids_stride + length + count, token)
        if IS_TEST:
            going = (draft >= 0) & (_uniform(row + TEST_SEED, length + count) < acceptance)
        else:
            going = draft == token
        count += 1
    tl.store(lengths + row, length + count, mask=length > 0)
    tl.store(out_counts + buffer, count)
    place = tl.arange(0, MAX_SLOTS)
    drafts = tl.load(next_drafts + first + place, mask=place < tl.load(group_sizes + first), other=-1)
    tl.store(out_drafts + buffer, tl.sum((drafts >= 0).to(tl.int32), 0))


def propose_ngrams(
    rows: torch.Tensor,
    offsets: torch.Tensor,
    group_sizes: torch.Tensor,
    room: torch.Tensor,
    lengths: torch.Tensor,
    token_ids: torch.Tensor,
    predictions: torch.Tensor,
    prediction_lengths: torch.Tensor,
    prompt_lengths: torch.Tensor,
    next_drafts: torch.Tensor,
    *,
    least: int,
    most: int,
    is_test: bool = False,
) -> None:
    """Proposes for all decodes of a step; see `engine.speculation.ngram.propose` for what.

    Args:
        rows: [S] int32, the row of each decode slot, -1 for padding.
        offsets: [S] int32, 0 in the first slot of each request, 1 in that of its first draft, and so on.
        group_sizes: [S] int32, slots of the request.
        room: [S] int32, tokens that the row may have in all before it computes another.
        lengths: [R] int32, tokens of each row.
        token_ids: [R, L] int32; drafts are written behind the ends of rows.
        predictions: [R, P] int32, of which row r has prediction_lengths[r].
        prompt_lengths: [R] int32, how many of each row's tokens are prompt.
        next_drafts: at least [S] int32, written: the draft after each slot, -1 for none.
        least, most: tokens of a run that is searched.
        is_test: propose the last token again and again.
    """
    if len(rows) == 0:
        return
    propose_kernel[(len(rows),)](
        rows,
        offsets,
        group_sizes,
        room,
        lengths,
        token_ids,
        predictions,
        prediction_lengths,
        prompt_lengths,
        next_drafts,
        token_ids.stride(0),
        predictions.stride(0),
        LEAST=least,
        MOST=most,
        IS_TEST=is_test,
        BLOCK=_SEARCH_BLOCK,
        MAX_SLOTS=MAX_SLOTS,
        num_warps=8,
    )


def prepare_slots(
    rows: torch.Tensor,
    offsets: torch.Tensor,
    room: torch.Tensor,
    seeds: torch.Tensor,
    next_drafts: torch.Tensor,
    lengths: torch.Tensor,
    token_ids: torch.Tensor,
    block_table: torch.Tensor,
    *,
    block_size: int,
    num_decodes: int,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    seq_lens: torch.Tensor,
    slot_rows: torch.Tensor,
    draws: torch.Tensor,
) -> None:
    """Lays out a step's decode slots and draws their random numbers. Lengths do not change.

    Args:
        rows: [S] int32, of all slots, chunks after the decodes.
        offsets, room, next_drafts, lengths, token_ids: see `propose_ngrams`.
        seeds: [S] int64, of the requests.
        block_table: [R, B] int32 block ids.
        num_decodes: how many slots, the first, are decodes.
        input_ids, positions, seq_lens: int32, written for decodes.
        slot_mapping: int32 or int64, the same.
        slot_rows: [S] int32, written: the row of each slot, -1 where it computes nothing.
        draws: [S] fp64, written for decodes.
    """
    num_slots = len(rows)
    if num_slots == 0:
        return
    slots_kernel[(triton.cdiv(num_slots, _SLOT_BLOCK),)](
        rows,
        offsets,
        room,
        seeds,
        next_drafts,
        lengths,
        token_ids,
        block_table,
        input_ids,
        positions,
        slot_mapping,
        seq_lens,
        slot_rows,
        draws,
        num_slots,
        num_decodes,
        token_ids.stride(0),
        block_table.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK=_SLOT_BLOCK,
        num_warps=4,
    )


def accept_drafts(
    sampling_rows: torch.Tensor,
    offsets: torch.Tensor,
    group_sizes: torch.Tensor,
    seq_lens: torch.Tensor,
    next_drafts: torch.Tensor,
    lengths: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    out_token_ids: torch.Tensor,
    out_counts: torch.Tensor,
    out_drafts: torch.Tensor,
    slot: torch.Tensor,
    acceptance: float | None = None,
) -> None:
    """Appends to every row that samples what it gains, and writes its length.

    Args:
        sampling_rows: [S] int32, the row that samples in each slot, -1 where none does.
        offsets, group_sizes, next_drafts: see `propose_ngrams`.
        seq_lens: [S] int32, where the token sampled in each slot goes; 0 in slots that compute nothing.
        lengths, token_ids: of all rows; written.
        out_token_ids: [num_buffers, S_max] int32, the token sampled in each slot.
        out_counts, out_drafts: the same shape and strides, written in the first slot of each request: the
            tokens that it gains, and the drafts that it had.
        slot: int32 [1], the result buffer of this step.
        acceptance: accept drafts with this probability, whatever was sampled.
    """
    num_slots = len(sampling_rows)
    if num_slots == 0:
        return
    accept_kernel[(num_slots,)](
        sampling_rows,
        offsets,
        group_sizes,
        seq_lens,
        next_drafts,
        lengths,
        token_ids,
        out_token_ids,
        out_counts,
        out_drafts,
        out_token_ids.stride(0),
        slot,
        token_ids.stride(0),
        0.0 if acceptance is None else acceptance,
        IS_TEST=acceptance is not None,
        MAX_SLOTS=MAX_SLOTS,
        num_warps=1,
    )
