"""Log probabilities of the chosen and of the likeliest tokens, for the rows of a step that asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.sampling.ordering import BELOW_ALL_KEYS, key_value, order_key

CHUNK = 4096
# More top entries than any request may ask for.
MAX_TOP = 32


@dataclass(frozen=True, slots=True)
class LogprobsWorkspace:
    """What the chunks of rows leave to be merged; no content outlives a call.

    Attributes:
        chunk_max, chunk_sum: [L_max, chunks] fp32.
        chunk_keys, chunk_ids: [L_max, chunks, MAX_TOP] int32.
    """

    chunk_max: torch.Tensor
    chunk_sum: torch.Tensor
    chunk_keys: torch.Tensor
    chunk_ids: torch.Tensor

    @classmethod
    def allocate(cls, max_rows: int, vocab_size: int, device: torch.device | str) -> LogprobsWorkspace:
        """For up to `max_rows` rows that ask; about 10 KB a row at a vocabulary of 152k."""
        shape = (max_rows, triton.cdiv(vocab_size, CHUNK))

        def array(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(
            array(shape, torch.float32),
            array(shape, torch.float32),
            array((*shape, MAX_TOP), torch.int32),
            array((*shape, MAX_TOP), torch.int32),
        )


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural logarithms of probabilities.

    Attributes:
        sampled: of the chosen token, [L] fp32.
        top_ids: of the likeliest tokens, likeliest first, between equals the lowest id first, [L, n] int32.
        top_logprobs: theirs, [L, n] fp32.
    """

    sampled: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


def gather_logprobs(
    logits: torch.Tensor,
    *,
    index: torch.Tensor,
    chosen: torch.Tensor,
    slot: torch.Tensor,
    num_top: int,
    workspace: LogprobsWorkspace,
    out: Logprobs,
) -> Logprobs:
    """log_softmax of raw logits at the chosen token and at the `num_top` likeliest, for L rows of a step.

    Args:
        logits: raw, [S, vocab] bf16, fp16 or fp32; not changed.
        index: int32 [L], the entries that asked; -1 for none, whose results are left as they are.
        chosen: [num_slots, S_max] int32, the tokens that `sample_rows` chose; read at [slot, index].
        slot: int32 [1].
        num_top: the most that any of the rows asked for; 0 to MAX_TOP and at most vocab.
        workspace: for at least L rows of this vocabulary.
        out: written, for at least L rows and `num_top` entries.

    Returns:
        The part of `out` that was written.
    """
    num_rows, vocab_size = len(index), logits.shape[1]
    assert 0 <= num_top <= min(MAX_TOP, vocab_size)
    result = Logprobs(
        out.sampled[:num_rows], out.top_ids[:num_rows, :num_top], out.top_logprobs[:num_rows, :num_top]
    )
    if num_rows == 0:
        return result
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    _reduce_chunks[(num_chunks, num_rows)](
        logits,
        logits.stride(0),
        index,
        num_top,
        workspace.chunk_max,
        workspace.chunk_sum,
        workspace.chunk_keys,
        workspace.chunk_ids,
        VOCAB=vocab_size,
        NUM_CHUNKS=num_chunks,
        CHUNK=CHUNK,
        MAX_TOP=MAX_TOP,
        num_warps=4,
    )
    _merge_chunks[(num_rows,)](
        logits,
        logits.stride(0),
        index,
        num_top,
        workspace.chunk_max,
        workspace.chunk_sum,
        workspace.chunk_keys,
        workspace.chunk_ids,
        chosen,
        chosen.stride(0),
        slot,
        out.sampled,
        out.top_ids,
        out.top_logprobs,
        out.top_ids.stride(0),
        out.top_logprobs.stride(0),
        NUM_CHUNKS=num_chunks,
        CHUNKS_PADDED=triton.next_power_of_2(num_chunks),
        MAX_TOP=MAX_TOP,
        num_warps=4,
    )
    return result


@triton.jit
def _take_largest(keys, ids):
    """The largest key, the lowest of its ids, and the keys without it. Ids of -1 belong to no token."""
    largest = tl.max(keys, 0)
    token = tl.min(tl.where(keys == largest, ids, 0x7FFFFFFF), 0)
    return largest, token, tl.where((keys == largest) & (ids == token), BELOW_ALL_KEYS, keys)


@triton.jit(do_not_specialize=["num_top"], do_not_specialize_on_alignment=["index", "chosen", "slot"])
def _reduce_chunks(
    logits,
    logits_stride,
    index,
    num_top,
    chunk_max,
    chunk_sum,
    chunk_keys,
    chunk_ids,
    VOCAB: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    MAX_TOP: tl.constexpr,
):
    """Program (c, l): chunk c's largest logit, sum of exponentials relative to it, and top entries."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    entry = tl.load(index + row).to(tl.int64)
    if entry < 0:
        return
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    in_vocab = ids < VOCAB
    x = tl.load(logits + entry * logits_stride + ids, mask=in_vocab, other=-float("inf")).to(tl.float32)
    largest = tl.max(x, 0)
    base = tl.where(largest == -float("inf"), 0.0, largest)
    place = row * NUM_CHUNKS + chunk
    tl.store(chunk_max + place, largest)
    tl.store(chunk_sum + place, tl.sum(tl.exp(x - base), 0))
    keys = tl.where(in_vocab, order_key(x, 0), BELOW_ALL_KEYS)
    for n in range(num_top):
        key, token, keys = _take_largest(keys, ids)
        tl.store(chunk_keys + place * MAX_TOP + n, key)
        tl.store(chunk_ids + place * MAX_TOP + n, token)


@triton.jit(do_not_specialize=["num_top"], do_not_specialize_on_alignment=["index", "chosen", "slot"])
def _merge_chunks(
    logits,
    logits_stride,
    index,
    num_top,
    chunk_max,
    chunk_sum,
    chunk_keys,
    chunk_ids,
    chosen,
    chosen_stride,
    slot,
    sampled,
    top_ids,
    top_logprobs,
    top_ids_stride,
    top_logprobs_stride,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    MAX_TOP: tl.constexpr,
):
    """Program l: the whole row's normaliser and top entries, from its chunks'."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.load(index + row).to(tl.int64)
    if entry < 0:
        return
    chunk = tl.arange(0, CHUNKS_PADDED)
    in_row = chunk < NUM_CHUNKS
    maxima = tl.load(chunk_max + row * NUM_CHUNKS + chunk, mask=in_row, other=-float("inf"))
    sums = tl.load(chunk_sum + row * NUM_CHUNKS + chunk, mask=in_row, other=0.0).to(tl.float64)
    largest = tl.max(maxima, 0)
    normaliser = tl.log(tl.sum(sums * tl.exp(maxima - largest).to(tl.float64), 0)) + largest
    token = tl.load(chosen + tl.load(slot).to(tl.int64) * chosen_stride + entry)
    x = tl.load(logits + entry * logits_stride + token).to(tl.float32)
    tl.store(sampled + row, (x - normaliser).to(tl.float32))

    entries = tl.arange(0, CHUNKS_PADDED * MAX_TOP)
    listed = (entries < NUM_CHUNKS * MAX_TOP) & (entries % MAX_TOP < num_top)
    first = row * NUM_CHUNKS * MAX_TOP
    keys = tl.load(chunk_keys + first + entries, mask=listed, other=BELOW_ALL_KEYS)
    ids = tl.load(chunk_ids + first + entries, mask=listed, other=-1)
    for n in range(num_top):
        key, token, keys = _take_largest(keys, ids)
        tl.store(top_ids + row * top_ids_stride + n, token)
        logprob = key_value(key, 0) - normaliser
        tl.store(top_logprobs + row * top_logprobs_stride + n, logprob.to(tl.float32))
