"""Step plans and step results, and their fixed binary layout in the shared-memory rings.

A plan tells a worker what one step computes; a result tells the scheduler what came of it. Both are
little-endian arrays behind a fixed header, 8-byte aligned, so that either side reads them as numpy views
without parsing. The layout is versioned by DISPATCH_VERSION, agreed in the handshake.

Ownership: the scheduler builds plans, each worker builds results; a decoded record owns its memory (one
copy out of the ring slot), so the slot is free as soon as decoding returns.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.dispatch.adapters import MAX_COMMAND_BYTES, AdapterCommand
from engine.dispatch.limits import MAX_TOP_LOGPROBS, EngineLimits
from engine.dispatch.sampling import (
    F32,
    NUM_COUNTS,
    SCALARS,
    SCALARS_FORMAT,
    U32,
    F32Array,
    RecordError,
    SamplingRecord,
    U32Array,
    pack_lists,
    scalars_of,
    u32,
    unpack,
)

DISPATCH_VERSION = 10
MAX_ERROR_BYTES = 4096
TRACE_BYTES = 24
# What of a request's id a worker is told, for its logs.
MAX_REQUEST_ID_BYTES = 64

NO_COPIES: U32Array = np.zeros((0, 2), U32)
NO_TOKENS: U32Array = np.zeros(0, U32)


@dataclass(slots=True)
class NewRequest:
    """A request that enters (or, after preemption, re-enters) the worker's rows, complete in itself.

    Attributes:
        row: the worker row it occupies until a plan frees the row. In [0, max_num_seqs).
        token_ids: prompt and any output so far.
        num_prompt_tokens: how many of `token_ids` are prompt (penalties treat output differently).
        block_ids: KV blocks it holds at first, in sequence order, those of each KV group after those of the
            group before; prefix-cache hits come first. Every group has as many. Those that lie behind the
            group's window say nothing: they are 0, and nothing of them is read.
        sampling: how its tokens are sampled.
        adapter_slot: the slot of the adapter that its tokens are computed with, plus 1; 0 is the base model
            alone.
        request_id: the request's public id, for logs; its first MAX_REQUEST_ID_BYTES arrive.
        trace: the span that the worker's spans of the request belong to, TRACE_BYTES of trace id and span id;
            empty if the request is not traced.
        prediction: tokens that the client expects much of the output to be; a proposer of drafts may copy
            from them. They change nothing else.
    """

    row: int
    token_ids: U32Array
    num_prompt_tokens: int
    block_ids: U32Array
    sampling: SamplingRecord
    adapter_slot: int = 0
    request_id: str = ""
    trace: bytes = b""
    prediction: U32Array = field(default_factory=lambda: NO_TOKENS)

    @property
    def num_words(self) -> int:
        """32-bit words of variable-length data this request adds to a plan record."""
        lists = len(self.token_ids) + len(self.block_ids) + len(self.prediction)
        return lists + self.sampling.num_words


@dataclass(slots=True)
class StepPlan:
    """What one step computes. A worker applies it in this order: free rows, add new requests, append
    block ids, copy blocks, then compute the scheduled tokens of every scheduled row.

    All columns have one entry per scheduled request, decode-only requests (count 1) in any position.

    Attributes:
        step_id: counts up by one.
        freed_rows: rows whose requests are gone (finished, aborted or preempted).
        new_requests: requests entering a row, each also scheduled in this plan.
        rows: the row of each scheduled request.
        starts: position of its first token computed in this step (= its num_computed_tokens). A request that
            computes the one token it has sampled last starts where the worker knows its row to end: that is
            behind the given position where steps in flight gain it more tokens than one.
        counts: how many tokens are computed, at least 1. Tokens come from the row; one that an earlier
            step sampled but the scheduler has not seen yet is in the row already.
        samples: 1 where the last computed position is the row's last token, so that a token is sampled
            and the worker appends it to the row; 0 for a chunk that ends earlier, and always for requests
            with pooling.
        num_new_blocks: how many block ids are appended to each request's block table in every KV group (those
            in NewRequest.block_ids are not repeated here).
        new_block_ids: the appended block ids of all scheduled requests, flat, in order; those of a KV group
            after those of the group before.
        masks: index into the columns -> which tokens that request may sample in this step, as words of 32
            bits: token i is allowed if bit i % 32 of word i // 32 is set, counted from the lowest. There are
            `mask_words(vocab_size)` of them, and bits past the vocabulary mean nothing. At least one token is
            allowed; the request samples.
        copied_blocks: (from, to) ids of blocks whose keys and values are copied, [n, 2]. No block is copied
            to twice, and none that is copied from is copied to, so that their order means nothing.
        num_kv_groups: groups of layers that have block tables of their own.
        work_ahead: the plan computes nothing; the worker does one piece of work that only makes later steps
            faster, such as the capture of a graph.
        adapter_command: the plan computes nothing; the worker does a piece of what this says.
        drafts: the most draft tokens that the worker may propose for each request and verify in this step,
            besides the token that it computes anyway. Only a request that computes the one token it has
            sampled last, without a mask, has any; its blocks have room for them, as far as its end allows.
            None where no request has.
    """

    step_id: int
    freed_rows: U32Array
    new_requests: list[NewRequest]
    rows: U32Array
    starts: U32Array
    counts: U32Array
    samples: U32Array
    num_new_blocks: U32Array
    new_block_ids: U32Array
    masks: dict[int, U32Array] = field(default_factory=dict)
    copied_blocks: U32Array = field(default_factory=lambda: NO_COPIES)
    num_kv_groups: int = 1
    work_ahead: bool = False
    adapter_command: AdapterCommand | None = None
    drafts: U32Array | None = None

    @property
    def num_draft_tokens(self) -> int:
        """The most draft tokens in the step."""
        return 0 if self.drafts is None else int(self.drafts.sum())


@dataclass(slots=True)
class TokenLogprobs:
    """Log probabilities of one sampled token, from the model's raw logits (before temperature, penalties
    and filters).

    Attributes:
        logprob: of the sampled token.
        top_ids: the likeliest tokens, likeliest first.
        top_logprobs: theirs.
    """

    logprob: float
    top_ids: Sequence[int] | U32Array
    top_logprobs: Sequence[float] | F32Array


@dataclass(slots=True)
class PromptLogprobs:
    """Log probabilities of n consecutive prompt tokens of one request, each given the tokens before it, from
    the model's raw logits.

    A chunk that computes positions [start, start + count) of a prompt of p tokens tells of the tokens
    start + 1 to min(start + count, p - 1), whenever it is computed.

    Attributes:
        index: of the request, into the plan's columns.
        first: index in the prompt of the first of the tokens.
        logprobs: of the tokens, [n].
        top_ids: the likeliest tokens in each place, likeliest first, [n, k].
        top_logprobs: theirs, [n, k].
    """

    index: int
    first: int
    logprobs: F32Array
    top_ids: U32Array
    top_logprobs: F32Array


@dataclass(slots=True)
class StepResult:
    """What one step produced.

    Attributes:
        step_id: of the plan.
        token_ids: the tokens that the scheduled requests with `samples` set have gained, in the plan's order.
        logprobs: index into `token_ids` -> log probabilities, for requests that asked.
        execute_us: time the worker spent on the step, microseconds.
        error: if not empty, the step failed and nothing else in the result holds but `is_last`.
        prompt_logprobs: of the requests that asked, for the prompt tokens this step can tell of.
        pooled: index into the plan's columns -> what pooling made of the final hidden states (after the last
            norm), or a classification head of that, [pooled_size]; for requests whose last prompt position
            this step computed.
        is_last: the worker can compute nothing any more, and ends.
        launch_us: time the worker spent on the step before its device had all of it, microseconds; 0 where
            they are one.
        num_tokens: how many of `token_ids` each of those requests has gained; None where each has gained one.
            A request gains none where its blocks have no room for the token to compute: steps before this one
            have taken it to its end.
        more_ahead: of a plan with `work_ahead` or an `adapter_command`: there is more of such work.
        num_drafts: how many draft tokens were proposed for each of the requests that `num_tokens` counts;
            None where none were.
    """

    step_id: int
    token_ids: U32Array
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    execute_us: int = 0
    error: str = ""
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    pooled: dict[int, F32Array] = field(default_factory=dict)
    is_last: bool = False
    launch_us: int = 0
    num_tokens: U32Array | None = None
    more_ahead: bool = False
    num_drafts: U32Array | None = None


# version, num_freed, step_id, num_new, num_scheduled, num_new_blocks, num_words, num_masks, words of a mask,
# num_copied_blocks, num_kv_groups, work_ahead, words of an adapter command, requests with a number of drafts
_PLAN_HEADER = struct.Struct("<IIQIIIIIIIIIIIxxxx")
# row, tokens, prompt tokens, blocks of all groups, adapter, predicted tokens, request id, trace; a
# SamplingRecord's numbers and its lists' counts
_NEW_REQUEST = struct.Struct(f"<6I{MAX_REQUEST_ID_BYTES}s{TRACE_BYTES}s{SCALARS_FORMAT}{NUM_COUNTS}I")
# version, num_tokens, step_id, num_logprobs, num_top, execute_us, num_error_bytes, num_prompt_logprobs,
# num_pooled, hidden_size (0 where nothing is pooled), is_last + 2 * more_ahead, launch_us,
# requests with a number of tokens, and of drafts
_RESULT_HEADER = struct.Struct("<IIQIIIIIIIIIIIxxxx")
_LOGPROB = np.dtype([("index", "<u4"), ("num_top", "<u4"), ("logprob", "<f4")])
_NO_LOGPROBS = np.zeros(0, _LOGPROB)
_PROMPT_LOGPROBS_WORDS = 4  # index, first, n, k


def plan_bytes(limits: EngineLimits) -> int:
    """Size of the largest plan record."""
    max_new_blocks = limits.max_num_seqs + limits.max_num_batched_tokens // limits.block_size
    max_new_blocks *= limits.num_kv_groups
    words = limits.max_num_seqs * (7 + 1 + limits.mask_words + 2 * limits.num_kv_groups)
    words += max_new_blocks + limits.max_new_words
    whole = limits.max_num_seqs * _NEW_REQUEST.size + words * 4
    # A command comes alone.
    return _PLAN_HEADER.size + max(whole, MAX_COMMAND_BYTES) + 64


def result_bytes(limits: EngineLimits) -> int:
    """Size of the largest result record: every row sampled with the most log probabilities, and as many
    prompt tokens and pooled states as one step may report."""
    top = MAX_TOP_LOGPROBS * 8
    per_row = limits.max_tokens_per_step * (4 + _LOGPROB.itemsize + top) + _PROMPT_LOGPROBS_WORDS * 4
    if limits.max_tokens_per_step > 1:
        per_row += 2 * 4
    size = limits.max_num_seqs * per_row + limits.max_prompt_logprobs * (4 + top)
    size += limits.max_pooled * (1 + limits.pooled_size) * 4
    return _RESULT_HEADER.size + size + MAX_ERROR_BYTES + 64


def _pack_new(request: NewRequest) -> tuple[bytes, list[U32Array]]:
    counts, words = pack_lists(request.sampling)
    fixed = _NEW_REQUEST.pack(
        request.row,
        len(request.token_ids),
        request.num_prompt_tokens,
        len(request.block_ids),
        request.adapter_slot,
        len(request.prediction),
        request.request_id.encode(errors="replace"),
        request.trace,
        *scalars_of(request.sampling),
        *counts,
    )
    return fixed, [request.token_ids, request.block_ids, request.prediction, *words]


def encode_plan(plan: StepPlan) -> bytes:
    """The plan's binary record."""
    fixed, ragged = [], []
    for request in plan.new_requests:
        row, arrays = _pack_new(request)
        fixed.append(row)
        ragged.extend(arrays)
    command = b"" if plan.adapter_command is None else plan.adapter_command.encode()
    header = _PLAN_HEADER.pack(
        DISPATCH_VERSION,
        len(plan.freed_rows),
        plan.step_id,
        len(fixed),
        len(plan.rows),
        len(plan.new_block_ids),
        sum(map(len, ragged)),
        len(plan.masks),
        len(next(iter(plan.masks.values()))) if plan.masks else 0,
        len(plan.copied_blocks),
        plan.num_kv_groups,
        plan.work_ahead,
        len(command) // 4,
        0 if plan.drafts is None else len(plan.drafts),
    )
    columns = (plan.freed_rows, plan.rows, plan.starts, plan.counts, plan.samples, plan.num_new_blocks)
    parts = [header, *fixed]
    arrays = [*columns, plan.new_block_ids, plan.copied_blocks]
    if plan.drafts is not None:
        arrays.append(plan.drafts)
    if plan.masks:
        arrays += [u32(list(plan.masks)), np.stack(list(plan.masks.values()))]
    parts += [array.astype(U32, copy=False).tobytes() for array in arrays]
    parts.append(command)
    parts += [array.astype(U32, copy=False).tobytes() for array in ragged]
    return b"".join(parts)


class _Words:
    """Reads consecutive arrays from a record's 32-bit words and refuses to read past their end."""

    __slots__ = ("_position", "_words")

    def __init__(self, record: bytes, offset: int) -> None:
        if len(record) < offset or (len(record) - offset) % 4:
            raise RecordError(f"a record of {len(record)} bytes ends too soon, or within a word")
        self._words = np.frombuffer(record, U32, offset=offset)
        self._position = 0

    def take(self, count: int) -> U32Array:
        begin = self._position
        end = self._position = begin + count
        if end > len(self._words):
            raise RecordError(f"a record of {len(self._words)} words ends inside an array of {count}")
        return self._words[begin:end]

    @property
    def num_left(self) -> int:
        return len(self._words) - self._position


def _header(record: bytes, layout: struct.Struct) -> tuple[int, ...]:
    """The header's fields after the version, which must be this one."""
    if len(record) < layout.size:
        raise RecordError(f"a record of {len(record)} bytes has no whole header")
    version, *fields = layout.unpack_from(record)
    if version != DISPATCH_VERSION:
        raise RecordError(f"record version {version}, expected {DISPATCH_VERSION}")
    return tuple(fields)


def _take_new(fixed: tuple[Any, ...], words: _Words) -> NewRequest:
    row, num_tokens, num_prompt_tokens, num_blocks, adapter_slot, num_predicted, *rest = fixed
    request_id, trace, *rest = rest
    token_ids, block_ids, prediction = map(words.take, (num_tokens, num_blocks, num_predicted))
    scalars, counts = tuple(rest[: len(SCALARS)]), tuple(rest[len(SCALARS) :])
    sampling = unpack(scalars, counts, words.take)
    return NewRequest(
        row,
        token_ids,
        num_prompt_tokens,
        block_ids,
        sampling,
        adapter_slot,
        request_id.rstrip(b"\0").decode(errors="replace"),
        trace if any(trace) else b"",
        prediction,
    )


def decode_plan(record: bytes) -> StepPlan:
    """The plan in a binary record.

    Raises:
        RecordError: the record is malformed.
    """
    num_freed, step_id, num_new, n, num_blocks, num_words, *rest = _header(record, _PLAN_HEADER)
    num_masks, width, num_copied, num_kv_groups, work_ahead, num_command, num_drafted = rest
    words_at = _PLAN_HEADER.size + num_new * _NEW_REQUEST.size
    words = _Words(record, words_at)
    freed_rows = words.take(num_freed)
    rows, starts, counts, samples, num_new_blocks = (words.take(n) for _ in range(5))
    new_block_ids = words.take(num_blocks)
    if num_blocks != (num_kv_groups * int(num_new_blocks.sum()) if num_blocks or num_new_blocks.any() else 0):
        raise RecordError(
            f"{num_blocks} new block ids in {num_kv_groups} groups, but the counts sum to "
            f"{num_new_blocks.sum()}"
        )
    copied_blocks = words.take(2 * num_copied).reshape(num_copied, 2)
    if num_drafted not in (0, n):
        raise RecordError(f"{num_drafted} requests of {n} have a number of drafts")
    drafts = words.take(n) if num_drafted else None
    masks = {}
    if num_masks or width:
        index = words.take(num_masks).tolist()
        masks = dict(zip(index, words.take(num_masks * width).reshape(num_masks, width), strict=True))
        if len(masks) != num_masks or not width:
            raise RecordError(f"{num_masks} masks of {width} words for {len(masks)} requests")
    command = AdapterCommand.decode(words.take(num_command).tobytes()) if num_command else None
    if words.num_left != num_words:
        raise RecordError(f"{words.num_left} words of new requests' data, the header has {num_words}")
    new_requests = []
    if num_new:
        fixed = record[_PLAN_HEADER.size : words_at]
        new_requests = [_take_new(request, words) for request in _NEW_REQUEST.iter_unpack(fixed)]
    if words.num_left or work_ahead > 1:
        raise RecordError(f"{words.num_left} words left over at the end of a plan, flags {work_ahead:#x}")
    columns = (rows, starts, counts, samples, num_new_blocks)
    return StepPlan(
        step_id,
        freed_rows,
        new_requests,
        *columns,
        new_block_ids,
        masks,
        copied_blocks,
        num_kv_groups,
        work_ahead == 1,
        command,
        drafts,
    )


def encode_result(result: StepResult) -> bytes:
    """The result's binary record. An error message is cut to MAX_ERROR_BYTES."""
    error = result.error.encode(errors="replace")[:MAX_ERROR_BYTES]
    entries = result.logprobs
    fixed = [(index, len(entry.top_ids), entry.logprob) for index, entry in entries.items()]
    header = _RESULT_HEADER.pack(
        DISPATCH_VERSION,
        len(result.token_ids),
        result.step_id,
        len(entries),
        sum(num_top for _, num_top, _ in fixed),
        min(result.execute_us, 2**32 - 1),
        len(error),
        len(result.prompt_logprobs),
        len(result.pooled),
        len(next(iter(result.pooled.values()))) if result.pooled else 0,
        result.is_last + 2 * result.more_ahead,
        min(result.launch_us, 2**32 - 1),
        0 if result.num_tokens is None else len(result.num_tokens),
        0 if result.num_drafts is None else len(result.num_drafts),
    )
    parts = [header, result.token_ids.astype(U32, copy=False).tobytes()]
    if result.num_tokens is not None:
        parts.append(result.num_tokens.astype(U32, copy=False).tobytes())
    if result.num_drafts is not None:
        parts.append(result.num_drafts.astype(U32, copy=False).tobytes())
    parts.append(np.array(fixed, dtype=_LOGPROB).tobytes() if fixed else b"")
    parts += [np.asarray(entry.top_ids, dtype=U32).tobytes() for entry in entries.values()]
    parts += [np.asarray(entry.top_logprobs, dtype=F32).tobytes() for entry in entries.values()]
    for prompt in result.prompt_logprobs:
        parts += _pack_prompt_logprobs(prompt)
    if result.pooled:
        states = np.stack(list(result.pooled.values()))
        parts += [u32(list(result.pooled)).tobytes(), states.astype(F32, copy=False).tobytes()]
    parts.append(error)
    return b"".join(parts)


def _pack_prompt_logprobs(prompt: PromptLogprobs) -> list[bytes]:
    fixed = u32([prompt.index, prompt.first, *prompt.top_ids.shape])
    floats = (prompt.logprobs, prompt.top_logprobs)
    logprobs, top_logprobs = (values.astype(F32, copy=False).tobytes() for values in floats)
    return [fixed.tobytes(), logprobs, prompt.top_ids.astype(U32, copy=False).tobytes(), top_logprobs]


def _take_prompt_logprobs(words: _Words) -> PromptLogprobs:
    index, first, n, k = words.take(_PROMPT_LOGPROBS_WORDS).tolist()
    logprobs, top_ids = words.take(n).view(F32), words.take(n * k).reshape(n, k)
    return PromptLogprobs(index, first, logprobs, top_ids, words.take(n * k).view(F32).reshape(n, k))


def _take_pooled(words: _Words, num_pooled: int, hidden_size: int) -> dict[int, F32Array]:
    index = words.take(num_pooled).tolist()
    states = words.take(num_pooled * hidden_size).view(F32).reshape(num_pooled, hidden_size)
    pooled = dict(zip(index, states, strict=True))
    if len(pooled) != num_pooled or not hidden_size:
        raise RecordError(f"{num_pooled} pooled states of {hidden_size} numbers for {len(pooled)} requests")
    return pooled


def decode_result(record: bytes) -> StepResult:
    """The result in a binary record.

    Raises:
        RecordError: the record is malformed.
    """
    num_tokens, step_id, num_logprobs, num_top, execute_us, num_error, *rest = _header(record, _RESULT_HEADER)
    num_prompts, num_pooled, hidden_size, flags, launch_us, num_counted, num_drafted = rest
    error_at = len(record) - num_error
    words = _Words(record[:error_at] if num_error else record, _RESULT_HEADER.size)
    token_ids = words.take(num_tokens)
    counted = words.take(num_counted) if num_counted else None
    if counted is not None and int(counted.sum()) != num_tokens:
        raise RecordError(f"{num_tokens} tokens, but {num_counted} requests gain {int(counted.sum())}")
    if num_drafted not in (0, num_counted):
        raise RecordError(f"{num_drafted} of {num_counted} requests have a number of drafts")
    drafted = words.take(num_drafted) if num_drafted else None
    fixed = words.take(3 * num_logprobs).view(_LOGPROB) if num_logprobs else _NO_LOGPROBS
    top_ids = words.take(num_top)
    top_logprobs: F32Array = words.take(num_top).view(F32)
    prompts = [_take_prompt_logprobs(words) for _ in range(num_prompts)]
    pooled = _take_pooled(words, num_pooled, hidden_size) if num_pooled or hidden_size else {}
    if words.num_left or num_top != (int(fixed["num_top"].sum()) if num_logprobs else 0):
        raise RecordError("a result's lengths do not add up")
    error = record[error_at:].decode(errors="replace") if num_error else ""
    logprobs, offset = {}, 0
    for entry in fixed:
        end = offset + int(entry["num_top"])
        logprobs[int(entry["index"])] = TokenLogprobs(
            float(entry["logprob"]), top_ids[offset:end], top_logprobs[offset:end]
        )
        offset = end
    flagged = (bool(flags & 1), launch_us, counted, bool(flags & 2), drafted)
    return StepResult(step_id, token_ids, logprobs, execute_us, error, prompts, pooled, *flagged)
