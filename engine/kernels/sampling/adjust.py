"""Penalties, bias, masks and bad words: the few rows of a step that change their logits before sampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.sampling import naive

BLOCK = 2048
LIST_BLOCK = 1024
WORD_BLOCK = 128
# An int32 count of a token's places in the output, with this bit set where the prompt has it too.
IN_PROMPT = tl.constexpr(1 << 30)
BAD_WORD_LOGIT = tl.constexpr(naive.BAD_WORD_LOGIT)

# May be parts of a larger array, whose alignment must not matter to a compiler.
SMALL_ARRAYS = [
    "index", "rows", "positions", "num_prompt_tokens",
    "repetition_penalty", "presence_penalty", "frequency_penalty",
    "allowed_ids", "allowed_offsets", "masked_ids", "masked_offsets",
    "bias_ids", "bias_values", "bias_offsets",
    "mask_index", "word_ids", "word_offsets", "first_words",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Penalties:
    """Of A adjusted rows, on the device.

    Attributes:
        repetition, presence, frequency: [A] fp32; 1, 0 and 0 change nothing.
        num_prompt_tokens: [A] int32.
    """

    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor
    num_prompt_tokens: torch.Tensor


@dataclass(frozen=True, slots=True)
class RaggedLists:
    """Token lists of A adjusted rows, on the device; row a's ids are ids[offsets[a] : offsets[a + 1]].

    Attributes:
        allowed_ids: the only tokens a row may generate; a row with none may generate all.
        masked_ids: tokens a row may not generate in this step.
        bias_ids, bias_values: added to the logits; within a row every id is there once at most.
        allowed_offsets, masked_offsets, bias_offsets: [A + 1] int32. Ids are int32, values fp32.
    """

    allowed_ids: torch.Tensor
    allowed_offsets: torch.Tensor
    masked_ids: torch.Tensor
    masked_offsets: torch.Tensor
    bias_ids: torch.Tensor
    bias_values: torch.Tensor
    bias_offsets: torch.Tensor


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Which tokens some of A adjusted rows may generate, on the device.

    Attributes:
        bits: [M, words] int32; bit i % 32 of word i // 32 is set where token i is allowed.
        index: [A] int32, each row's mask, -1 for none. A row with a mask has no allowed_ids.
    """

    bits: torch.Tensor
    index: torch.Tensor


@dataclass(frozen=True, slots=True)
class BadWords:
    """Token sequences that A adjusted rows may not complete in their output, on the device.

    Attributes:
        ids: of all sequences, one after another, int32.
        offsets: where each begins and the last ends, int32; none is empty.
        first: [A + 1] int32; row a's sequences are first[a] to first[a + 1] - 1.
        num_prompt_tokens: [A] int32.
    """

    ids: torch.Tensor
    offsets: torch.Tensor
    first: torch.Tensor
    num_prompt_tokens: torch.Tensor


@dataclass(frozen=True, slots=True)
class AdjustWorkspace:
    """Room for up to A_max adjusted rows.

    Attributes:
        logits: [A_max, vocab] fp32; what `adjust_logits` leaves is what `sample_rows` takes.
        counts: [A_max, vocab] int32, zero before every call and after it.
    """

    logits: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def allocate(cls, max_rows: int, vocab_size: int, device: torch.device | str) -> AdjustWorkspace:
        """Eight bytes for each row and token of the vocabulary."""
        shape = (max_rows, vocab_size)
        return cls(torch.empty(shape, device=device), torch.zeros(shape, dtype=torch.int32, device=device))


def adjust_logits(
    logits: torch.Tensor,
    *,
    index: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    token_ids: torch.Tensor,
    penalties: Penalties | None,
    lists: RaggedLists,
    masks: TokenMasks,
    bad_words: BadWords,
    workspace: AdjustWorkspace,
) -> torch.Tensor:
    """Adjusts A of a step's rows: allowed ids or masks, masked ids, bias, bad words, then penalties, in this
    order.

    The repetition penalty (arXiv:1909.05858) divides positive and multiplies negative logits of tokens in the
    prompt or the output; the other two subtract for tokens in the output.

    Args:
        logits: raw, [S, vocab] bf16, fp16 or fp32; not changed.
        index: int32 [A], the entries of the step to adjust; -1 for none.
        rows, positions: int32 [S], as in `SamplingColumns`; a position is also how many tokens its row has.
        token_ids: every persistent row's tokens, [R, max_model_len] int32.
        penalties: of the A rows; None if no row has any.
        lists, masks, bad_words: of the A rows; of what no row has there are no ids, and nothing is launched.

    Returns:
        [A, vocab] fp32, a part of the workspace; row a is entry index[a].
    """
    num_adjusted, vocab_size = len(index), logits.shape[1]
    adjusted, counts = workspace.logits, workspace.counts
    vocab_blocks = triton.cdiv(vocab_size, BLOCK)
    token_blocks = triton.cdiv(token_ids.shape[1], BLOCK) if penalties else 0
    if num_adjusted == 0:
        return adjusted[:0]
    _copy_and_count[(max(vocab_blocks, token_blocks), num_adjusted)](
        logits,
        logits.stride(0),
        adjusted,
        counts,
        index,
        rows,
        positions,
        token_ids,
        token_ids.stride(0),
        lists.allowed_offsets,
        penalties.num_prompt_tokens if penalties else index,
        masks.bits,
        masks.index,
        VOCAB=vocab_size,
        MASK_WORDS=triton.cdiv(vocab_size, 32),
        BLOCK=BLOCK,
        HAS_PENALTIES=penalties is not None,
        num_warps=4,
    )
    if len(lists.allowed_ids) or len(lists.masked_ids) or len(lists.bias_ids):
        _apply_lists[(num_adjusted,)](
            logits,
            logits.stride(0),
            adjusted,
            index,
            lists.allowed_ids,
            lists.allowed_offsets,
            lists.masked_ids,
            lists.masked_offsets,
            lists.bias_ids,
            lists.bias_values,
            lists.bias_offsets,
            VOCAB=vocab_size,
            BLOCK=LIST_BLOCK,
            num_warps=4,
        )
    if len(bad_words.ids):
        _apply_bad_words[(num_adjusted,)](
            adjusted,
            index,
            rows,
            positions,
            token_ids,
            token_ids.stride(0),
            bad_words.num_prompt_tokens,
            bad_words.ids,
            bad_words.offsets,
            bad_words.first,
            VOCAB=vocab_size,
            BLOCK=WORD_BLOCK,
            num_warps=4,
        )
    if penalties:
        _apply_penalties[(token_blocks, num_adjusted)](
            adjusted,
            counts,
            index,
            rows,
            positions,
            token_ids,
            token_ids.stride(0),
            penalties.repetition,
            penalties.presence,
            penalties.frequency,
            VOCAB=vocab_size,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return adjusted[:num_adjusted]


@triton.jit(do_not_specialize_on_alignment=SMALL_ARRAYS)
def _copy_and_count(
    logits,
    logits_stride,
    adjusted,
    counts,
    index,
    rows,
    positions,
    token_ids,
    token_ids_stride,
    allowed_offsets,
    num_prompt_tokens,
    mask_bits,
    mask_index,
    VOCAB: tl.constexpr,
    MASK_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_PENALTIES: tl.constexpr,
):
    """Program (b, a): block b of the logits of row a, upcast or -inf; and counts of block b of its tokens."""
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    entry = tl.load(index + row).to(tl.int64)
    if entry < 0:
        return
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    in_vocab = offsets < VOCAB
    x = tl.load(logits + entry * logits_stride + offsets, mask=in_vocab, other=0.0).to(tl.float32)
    num_allowed = tl.load(allowed_offsets + row + 1) - tl.load(allowed_offsets + row)
    x = tl.where(num_allowed > 0, -float("inf"), x)
    mask = tl.load(mask_index + row).to(tl.int64)
    if mask >= 0:
        word = tl.load(mask_bits + mask * MASK_WORDS + offsets // 32, mask=in_vocab, other=0)
        x = tl.where((word >> (offsets % 32)) & 1 != 0, x, -float("inf"))
    tl.store(adjusted + row * VOCAB + offsets, x, mask=in_vocab)
    if HAS_PENALTIES:
        request = tl.load(rows + entry).to(tl.int64)
        length = tl.where(request < 0, 0, tl.load(positions + entry))
        in_sequence = offsets < length
        token = tl.load(token_ids + request * token_ids_stride + offsets, mask=in_sequence, other=0)
        prompt_length = tl.load(num_prompt_tokens + row)
        count = counts + row * VOCAB + token
        tl.atomic_add(count, 1, mask=in_sequence & (offsets >= prompt_length), sem="relaxed")
        tl.atomic_or(count, IN_PROMPT, mask=in_sequence & (offsets < prompt_length), sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=SMALL_ARRAYS)
def _apply_lists(
    logits,
    logits_stride,
    adjusted,
    index,
    allowed_ids,
    allowed_offsets,
    masked_ids,
    masked_offsets,
    bias_ids,
    bias_values,
    bias_offsets,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program a: gives row a its allowed logits back, then masks, then adds the bias."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.load(index + row).to(tl.int64)
    if entry < 0:
        return
    lane = tl.arange(0, BLOCK)
    line = adjusted + row * VOCAB
    end = tl.load(allowed_offsets + row + 1)
    for begin in range(tl.load(allowed_offsets + row), end, BLOCK):
        listed = begin + lane < end
        token = tl.load(allowed_ids + begin + lane, mask=listed, other=0)
        x = tl.load(logits + entry * logits_stride + token, mask=listed, other=0.0).to(tl.float32)
        tl.store(line + token, x, mask=listed)
    tl.debug_barrier()
    end = tl.load(masked_offsets + row + 1)
    for begin in range(tl.load(masked_offsets + row), end, BLOCK):
        listed = begin + lane < end
        token = tl.load(masked_ids + begin + lane, mask=listed, other=0)
        tl.store(line + token, tl.full((BLOCK,), -float("inf"), tl.float32), mask=listed)
    tl.debug_barrier()
    end = tl.load(bias_offsets + row + 1)
    for begin in range(tl.load(bias_offsets + row), end, BLOCK):
        listed = begin + lane < end
        token = tl.load(bias_ids + begin + lane, mask=listed, other=0)
        bias = tl.load(bias_values + begin + lane, mask=listed, other=0.0)
        x = tl.load(line + token, mask=listed, other=0.0)
        tl.store(line + token, x + bias, mask=listed)


@triton.jit(do_not_specialize_on_alignment=SMALL_ARRAYS)
def _apply_bad_words(
    adjusted,
    index,
    rows,
    positions,
    token_ids,
    token_ids_stride,
    num_prompt_tokens,
    word_ids,
    word_offsets,
    first_words,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program a: compares row a's words, BLOCK at a time, to the end of its output, last token first."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.load(index + row).to(tl.int64)
    if entry < 0:
        return
    request = tl.load(rows + entry).to(tl.int64)
    if request < 0:
        return
    length = tl.load(positions + entry)
    num_outputs = length - tl.load(num_prompt_tokens + row)
    line = adjusted + row * VOCAB
    end = tl.load(first_words + row + 1)
    for first in range(tl.load(first_words + row), end, BLOCK):
        word = first + tl.arange(0, BLOCK)
        listed = word < end
        begin = tl.load(word_offsets + word, mask=listed, other=0)
        last = tl.load(word_offsets + word + 1, mask=listed, other=1) - 1
        num_before = last - begin
        matches = listed & (num_before <= num_outputs)
        for back in range(1, tl.max(tl.where(matches, num_before, 0), 0) + 1):
            token = tl.load(token_ids + request * token_ids_stride + length - back)
            compared = matches & (back <= num_before)
            expected = tl.load(word_ids + last - back, mask=compared, other=0)
            matches &= (expected == token) | (back > num_before)
        completing = tl.load(word_ids + last, mask=matches, other=0)
        x = tl.load(line + completing, mask=matches, other=-float("inf"))
        forbidden = tl.full((BLOCK,), BAD_WORD_LOGIT, tl.float32)
        tl.store(line + completing, forbidden, mask=x != -float("inf"))


@triton.jit(do_not_specialize_on_alignment=SMALL_ARRAYS)
def _apply_penalties(
    adjusted,
    counts,
    index,
    rows,
    positions,
    token_ids,
    token_ids_stride,
    repetition_penalty,
    presence_penalty,
    frequency_penalty,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (b, a): penalizes the tokens in block b of row a's sequence that no other place has taken.

    Of all places of a token one gets its count, by exchanging it for 0, which also cleans up.
    """
    row = tl.program_id(1).to(tl.int64)
    entry = tl.load(index + row).to(tl.int64)
    if entry < 0:
        return
    request = tl.load(rows + entry).to(tl.int64)
    length = tl.load(positions + entry)
    begin = tl.program_id(0) * BLOCK
    if (request < 0) | (begin >= length):
        return
    offsets = begin + tl.arange(0, BLOCK)
    in_sequence = offsets < length
    token = tl.load(token_ids + request * token_ids_stride + offsets, mask=in_sequence, other=0)
    count = tl.atomic_xchg(counts + row * VOCAB + token, 0, mask=in_sequence, sem="relaxed")
    taken = in_sequence & (count != 0)
    num_outputs = count & (IN_PROMPT - 1)
    repetition = tl.load(repetition_penalty + row)
    x = tl.load(adjusted + row * VOCAB + token, mask=taken, other=0.0)
    x = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
    x -= tl.load(frequency_penalty + row) * num_outputs.to(tl.float32)
    x -= tl.where(num_outputs > 0, tl.load(presence_penalty + row), 0.0)
    tl.store(adjusted + row * VOCAB + token, x, mask=taken)
