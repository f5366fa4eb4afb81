"""Sampling features that few requests use: log probabilities, penalties, masks, bad words and token lists.

They run after the main sampling, only for the rows that need them. A step without such requests launches none
of these kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch

from engine.attention.interface import IntArray
from engine.cuda.logprobs import LogprobsBuffers, LogprobsRequest
from engine.cuda.rows import DeviceRows
from engine.cuda.staging import NUM_TURNS, Staging
from engine.cuda.step_shape import StepColumns
from engine.dispatch.limits import mask_words
from engine.dispatch.sampling import PENALTIES, U32Array
from engine.kernels.sampling.adjust import (
    AdjustWorkspace,
    BadWords,
    Penalties,
    RaggedLists,
    TokenMasks,
    adjust_logits,
)
from engine.kernels.sampling.kernel import SamplingColumns, SamplingWorkspace, sample_rows
from engine.kernels.sampling.logprobs import LogprobsWorkspace, gather_logprobs
from engine.sampling.parameters import SamplingBatch, SamplingTable, TokenLists, subset

# Rows adjusted at once; each takes 8 bytes per token of the vocabulary. A step with more rows adjusts them in
# several rounds in the same memory.
ROWS_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class _Adjustments:
    """The logits adjustments of A rows, on the device; see `adjust_logits`."""

    index: torch.Tensor
    penalties: Penalties | None
    lists: RaggedLists
    masks: TokenMasks
    bad_words: BadWords

    def part(self, rows: slice) -> _Adjustments:
        """The adjustments of a slice of the rows."""
        penalties, lists, bad_words = self.penalties, self.lists, self.bad_words
        if penalties:
            penalties = Penalties(
                penalties.repetition[rows],
                penalties.presence[rows],
                penalties.frequency[rows],
                penalties.num_prompt_tokens[rows],
            )
        ends = slice(rows.start, rows.stop + 1)
        return _Adjustments(
            self.index[rows],
            penalties,
            replace(
                lists,
                allowed_offsets=lists.allowed_offsets[ends],
                masked_offsets=lists.masked_offsets[ends],
                bias_offsets=lists.bias_offsets[ends],
            ),
            replace(self.masks, index=self.masks.index[rows]),
            replace(
                bad_words,
                first=bad_words.first[ends],
                num_prompt_tokens=bad_words.num_prompt_tokens[rows],
            ),
        )


class SamplingExtras:
    """Runs after the main sampling, on the same stream, and never waits for the device."""

    def __init__(
        self,
        rows: DeviceRows,
        out_token_ids: torch.Tensor,
        workspace: SamplingWorkspace,
        *,
        append: bool = True,
    ) -> None:
        """`append`: whether sampled tokens are appended to rows; see `sample_rows`."""
        self._append = append
        self._rows = rows
        self._out_token_ids = out_token_ids
        self._workspace = workspace
        device, limits = rows.arena.device, rows.limits
        num_rows, vocab_size = limits.max_num_seqs + limits.max_draft_tokens, limits.vocab_size
        self._adjusted = AdjustWorkspace.allocate(min(num_rows, ROWS_AT_ONCE), vocab_size, device)
        self._chunks = LogprobsWorkspace.allocate(num_rows, vocab_size, device)
        self._staging = Staging(NUM_TURNS, device)
        self._masks = _Masks(NUM_TURNS, num_rows, vocab_size, device)
        self._results = LogprobsBuffers(NUM_TURNS, num_rows, device)

    def after_sampling(
        self,
        batch: SamplingBatch,
        slots: IntArray,
        plan_order: IntArray,
        logits: torch.Tensor,
        columns: StepColumns[torch.Tensor],
        positions: torch.Tensor,
    ) -> LogprobsRequest | None:
        """Samples again, from adjusted logits, for requests that adjust them; then gathers the log
        probabilities that requests asked for.

        Args:
            batch: the sampling parameters of the step's requests.
            slots: the slot of each request of the batch.
            plan_order: the requests that sample, as indices into the batch, in the order of the result.
            logits: raw logits, [S, vocab].
            columns: the step's columns.
            positions: the position of each slot's sampled token, [S].

        Returns:
            The pending log probabilities; None if no request that samples asked for any.
        """
        adjusts = batch.columns["has_penalties"] | batch.columns["has_lists"]
        asks = batch.columns["logprobs"] >= 0
        if batch.masks:
            adjusts[list(batch.masks)] = True
        if not adjusts.any() and not asks.any():
            return None
        adjusted = plan_order[adjusts[plan_order]]
        index = np.flatnonzero(asks[plan_order])
        if not len(adjusted) and not len(index):  # the requests that need it do not sample in this step
            return None
        asked = plan_order[index]
        arrays = [slots[asked].astype(np.int32)]
        if len(adjusted):
            part = subset(batch, adjusted)
            arrays += _host_arrays(part, slots[adjusted])
        asking, *adjusting = self._staging.send(arrays)
        if len(adjusted):
            adjustments = _on_device(adjusting, self._masks.send(part.masks))
            if not part.columns["has_penalties"].any():
                adjustments = replace(adjustments, penalties=None)
            self._resample(adjustments, logits, columns, positions)
        if not len(index):
            return None
        request = self._results.take(index, batch.columns["logprobs"][asked])
        self._gather(asking, request, logits, columns)
        return request

    def rehearse(
        self, logits: torch.Tensor, columns: StepColumns[torch.Tensor], positions: torch.Tensor
    ) -> None:
        """Launches all kernels of this module without a request, so that the first request that needs them
        does not wait for the compiler."""
        nobody = np.full(1, -1)
        nobodys = SamplingTable(1).select(np.zeros(1, dtype=np.int64), nobody)
        nobodys.lists[0] = _SOME_LISTS
        everything = _on_device(self._staging.send(_host_arrays(nobodys, nobody)), self._masks.send({}))
        for adjustments in (everything, replace(everything, penalties=None)):
            self._resample(adjustments, logits, columns, positions)
        self._gather(
            everything.index, self._results.take(nobody, np.ones(1, dtype=np.int64)), logits, columns
        )

    def _resample(
        self,
        adjustments: _Adjustments,
        logits: torch.Tensor,
        columns: StepColumns[torch.Tensor],
        positions: torch.Tensor,
    ) -> None:
        sampling = sampling_columns(columns, positions)
        num_rows, at_once = len(adjustments.index), len(self._adjusted.logits)
        for begin in range(0, num_rows, at_once):
            part = adjustments.part(slice(begin, min(begin + at_once, num_rows)))
            adjusted = adjust_logits(
                logits,
                index=part.index,
                rows=columns.sampling_rows,
                positions=positions,
                token_ids=self._rows.token_ids,
                penalties=part.penalties,
                lists=part.lists,
                masks=part.masks,
                bad_words=part.bad_words,
                workspace=self._adjusted,
            )
            sample_rows(
                adjusted,
                columns=sampling,
                token_ids=self._rows.token_ids,
                out_token_ids=self._out_token_ids,
                out_largest=None,
                slot=columns.result,
                workspace=self._workspace,
                index=part.index,
                append=self._append,
            )

    def _gather(
        self,
        index: torch.Tensor,
        request: LogprobsRequest,
        logits: torch.Tensor,
        columns: StepColumns[torch.Tensor],
    ) -> None:
        gather_logprobs(
            logits,
            index=index,
            chosen=self._out_token_ids,
            slot=columns.result,
            num_top=min(int(request.num_top.max()), logits.shape[1]),
            workspace=self._chunks,
            out=request.out,
        )


def sampling_columns(columns: StepColumns[torch.Tensor], positions: torch.Tensor) -> SamplingColumns:
    """The sampling kernel's arguments for a step whose sampled tokens go to these positions."""
    return SamplingColumns(
        **columns.sampling, draw=columns.draws, rows=columns.sampling_rows, positions=positions
    )


_NO_LISTS = TokenLists(
    bias_ids=np.zeros(0, dtype=np.int64),
    bias_values=np.zeros(0, dtype=np.float32),
    allowed_ids=np.zeros(0, dtype=np.int64),
    masked_ids=np.zeros(0, dtype=np.int64),
)
_SOME_LISTS = TokenLists(
    bias_ids=np.zeros(1, dtype=np.int64),
    bias_values=np.zeros(1, dtype=np.float32),
    allowed_ids=np.zeros(1, dtype=np.int64),
    masked_ids=np.zeros(1, dtype=np.int64),
    bad_words=((0,),),
)


def _host_arrays(batch: SamplingBatch, slots: IntArray) -> list[np.ndarray]:
    """The arrays that `_on_device` expects, in its order, int32 and fp32."""
    columns = batch.columns
    too_short = batch.positions - columns["num_prompt_tokens"] < columns["min_tokens"]
    lists = [batch.lists.get(i, _NO_LISTS) for i in range(len(slots))]
    allowed, allowed_offsets = _ragged([each.allowed_ids for each in lists])
    masked = [
        each.masked_ids if short else _NO_LISTS.masked_ids
        for each, short in zip(lists, too_short, strict=True)
    ]
    masked_ids, masked_offsets = _ragged(masked)
    bias_ids, bias_offsets = _ragged([each.bias_ids for each in lists])
    words = list(chain.from_iterable(each.bad_words for each in lists))
    mask_index = np.full(len(slots), -1, dtype=np.int32)
    mask_index[list(batch.masks)] = np.arange(len(batch.masks))
    return [
        slots.astype(np.int32),
        *(columns[name].copy() for name in PENALTIES),
        columns["num_prompt_tokens"].astype(np.int32),
        allowed,
        allowed_offsets,
        masked_ids,
        masked_offsets,
        bias_ids,
        np.concatenate([each.bias_values for each in lists]),
        bias_offsets,
        np.array(list(chain.from_iterable(words)), dtype=np.int32),
        _offsets([len(word) for word in words]),
        _offsets([len(each.bad_words) for each in lists]),
        mask_index,
    ]


def _ragged(lists: list[IntArray]) -> tuple[np.ndarray, np.ndarray]:
    """(the concatenated lists, their `_offsets`), both int32."""
    return np.concatenate(lists).astype(np.int32), _offsets([len(each) for each in lists])


def _offsets(sizes: list[int]) -> np.ndarray:
    """The offsets at which concatenated arrays of these sizes begin, and the end of the last; int32."""
    return np.cumsum([0, *sizes], dtype=np.int32)


def _on_device(arrays: list[torch.Tensor], mask_bits: torch.Tensor) -> _Adjustments:
    """Makes the adjustments from the device copies of `_host_arrays` and of the same rows' masks."""
    index, *rest = arrays
    word_ids, word_offsets, first_words, mask_index = rest[11:]
    return _Adjustments(
        index,
        Penalties(*rest[:4]),
        RaggedLists(*rest[4:11]),
        TokenMasks(mask_bits, mask_index),
        BadWords(word_ids, word_offsets, first_words, num_prompt_tokens=rest[3]),
    )


class _Masks:
    """Pinned host memory and device memory for the masks of a step's rows; see Staging."""

    def __init__(self, num_turns: int, max_rows: int, vocab_size: int, device: torch.device) -> None:
        shape = (max_rows, mask_words(vocab_size))
        self._turn = 0
        pin = device.type == "cuda"
        self._host = torch.zeros((num_turns, *shape), dtype=torch.int32, pin_memory=pin)
        self._device = torch.zeros(shape, dtype=torch.int32, device=device)

    def send(self, masks: Mapping[int, U32Array]) -> torch.Tensor:
        """Starts the copy of these masks, in order. Returns the device tensor for all rows."""
        if masks:
            self._turn = (self._turn + 1) % len(self._host)
            staged = self._host[self._turn, : len(masks)]
            np.stack(list(masks.values()), out=staged.numpy().view(np.uint32))
            self._device[: len(masks)].copy_(staged, non_blocking=True)
        return self._device
