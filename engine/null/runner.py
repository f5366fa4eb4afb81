"""Answers plans with text that nobody computed, when its time has come."""

from __future__ import annotations

import logging
import time

import numpy as np
import numpy.typing as npt

from engine.dispatch.records import NewRequest, PromptLogprobs, StepPlan, StepResult, TokenLogprobs
from engine.dispatch.sampling import F32, F32Array, Pooling, SamplingRecord, U32Array
from engine.null.text import NullText, begin_of
from engine.step.runner import FinishedStep, PendingStep

logger = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]

# Every token's; the likeliest ones follow at this distance from each other.
LOGPROB = -1.0


class NullRunner:
    """Takes as long for a step as it is told to, and samples from a text.

    It sleeps through its steps in `launch`, as a CPU computes in it; a plan that comes meanwhile waits in the
    ring, so that steps follow each other without a gap.

    Args:
        text: what is sampled.
        max_num_seqs: rows.
        vocab_size: bits of a mask that mean anything.
        hidden_size: numbers of a pooled state.
        eos_token_ids: what ends a structured output, where its mask allows it.
        step_seconds: what each step takes.
        prompt_token_seconds: what each token of a chunk adds. A request that computes one token is decoding.
    """

    def __init__(
        self,
        text: NullText,
        *,
        max_num_seqs: int,
        vocab_size: int,
        hidden_size: int,
        eos_token_ids: tuple[int, ...],
        step_seconds: float,
        prompt_token_seconds: float,
    ) -> None:
        self._text = text
        self._vocab_size = vocab_size
        self._hidden_size = hidden_size
        self._eos_token_ids = eos_token_ids
        self._step_seconds = step_seconds
        self._prompt_token_seconds = prompt_token_seconds
        self._begins = np.zeros(max_num_seqs, np.uint64)
        # Rows whose requests want more than a token of the text.
        self._unusual: dict[int, NewRequest] = {}
        self._free_at = 0.0

    def reset(self) -> None:
        self._unusual.clear()

    def work_ahead(self) -> bool:
        return False

    def launch(self, plan: StepPlan) -> PendingStep:
        began = time.monotonic()
        try:
            result = self._answer(plan)
        except Exception as error:
            logger.exception("step %d failed", plan.step_id)
            return FinishedStep.failed(plan.step_id, f"{type(error).__name__}: {error}")
        self._sleep(began, plan.counts)
        result.execute_us = round((time.monotonic() - began) * 1e6)
        return FinishedStep(result)

    def _answer(self, plan: StepPlan) -> StepResult:
        if self._unusual:
            for row in plan.freed_rows.tolist():
                self._unusual.pop(row, None)
        for request in plan.new_requests:
            self._begins[request.row] = begin_of(request.sampling.seed)
            if _is_unusual(request.sampling):
                self._unusual[request.row] = request
        sampled = np.flatnonzero(plan.samples)
        rows = plan.rows[sampled]
        result = StepResult(
            plan.step_id,
            self._text.tokens(self._begins[rows], plan.starts[sampled] + plan.counts[sampled]),
        )
        if plan.masks:
            self._obey_masks(plan, sampled, result.token_ids)
        if self._unusual:
            self._answer_unusual(plan, sampled, result)
        return result

    def _sleep(self, began: float, counts: U32Array) -> None:
        """Until the step is over. A step begins when its plan is here and the one before it is over."""
        seconds = self._step_seconds
        if self._prompt_token_seconds:
            seconds += int(counts[counts > 1].sum()) * self._prompt_token_seconds
        self._free_at = max(began, self._free_at) + seconds
        left = self._free_at - time.monotonic()
        if left > 0:
            time.sleep(left)
        else:
            self._free_at = began

    def _obey_masks(self, plan: StepPlan, sampled: IntArray, token_ids: U32Array) -> None:
        places = {int(index): place for place, index in enumerate(sampled)}
        for index, mask in plan.masks.items():
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: self._vocab_size]
            place = places[index]
            ends = [token_id for token_id in self._eos_token_ids if bits[token_id]]
            allowed = np.flatnonzero(bits)
            token_ids[place] = ends[0] if ends else allowed[int(token_ids[place]) % len(allowed)]

    def _answer_unusual(self, plan: StepPlan, sampled: IntArray, result: StepResult) -> None:
        for place, index in enumerate(sampled.tolist()):
            request = self._unusual.get(int(plan.rows[index]))
            if request is None:
                continue
            asked = request.sampling
            if asked.allowed_token_ids and index not in plan.masks:
                allowed = asked.allowed_token_ids
                result.token_ids[place] = allowed[int(result.token_ids[place]) % len(allowed)]
            if asked.logprobs >= 0:
                top_ids = self._text.token_ids[: asked.logprobs]
                result.logprobs[place] = TokenLogprobs(LOGPROB, top_ids, _falling(len(top_ids)))
        for index, row in enumerate(plan.rows.tolist()):
            request = self._unusual.get(row)
            if request is not None:
                self._tell_of_prompt(request, index, int(plan.starts[index]), int(plan.counts[index]), result)

    def _tell_of_prompt(
        self, request: NewRequest, index: int, start: int, count: int, result: StepResult
    ) -> None:
        asked, num_prompt_tokens = request.sampling, request.num_prompt_tokens
        told = min(start + count, num_prompt_tokens - 1) - start
        if asked.prompt_logprobs >= 0 and told > 0:
            top_ids = self._text.token_ids[: asked.prompt_logprobs]
            result.prompt_logprobs.append(
                PromptLogprobs(
                    index,
                    start + 1,
                    np.full(told, LOGPROB, F32),
                    np.tile(top_ids, (told, 1)),
                    np.tile(_falling(len(top_ids)), (told, 1)),
                )
            )
        if asked.pooling != Pooling.NONE and start + count == num_prompt_tokens:
            result.pooled[index] = np.full(self._hidden_size, self._hidden_size**-0.5, F32)


def _is_unusual(asked: SamplingRecord) -> bool:
    return bool(
        asked.logprobs >= 0
        or asked.prompt_logprobs >= 0
        or asked.allowed_token_ids
        or asked.pooling != Pooling.NONE
    )


def _falling(count: int) -> F32Array:
    return (LOGPROB - np.arange(count)).astype(F32)
