"""A step that was launched and whose result may not be there yet."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch

from engine.dispatch.records import PromptLogprobs, StepResult, TokenLogprobs
from engine.dispatch.sampling import F32Array
from engine.sampling.sampler import RawLogprobs, Sampled
from engine.step.accepted import AcceptedSlots
from engine.step.runner import NOT_FINITE, FinishedStep


@dataclass(frozen=True, slots=True)
class PromptResults:
    """What a step tells of prompts; see StepResult."""

    logprobs: list[PromptLogprobs] = field(default_factory=list)
    pooled: dict[int, F32Array] = field(default_factory=dict)


NO_PROMPT_RESULTS = PromptResults()


class SampledStep:
    """A step whose tokens are on their way from the device.

    The copies to the host are queued behind the step when this is made; an event tells when they are there.
    """

    def __init__(
        self,
        step_id: int,
        started: float,
        sampled: Sampled,
        prompts: PromptResults = NO_PROMPT_RESULTS,
        accepted: AcceptedSlots | None = None,
    ) -> None:
        """`accepted`: which slots of `sampled` count, if not all."""
        self._accepted = accepted
        self._step_id = step_id
        self._started = started
        self._prompts = prompts
        device = sampled.token_ids.device
        self._token_ids = _to_host(sampled.token_ids)
        self._largest = _to_host(sampled.largest)
        self._logprobs = None if sampled.logprobs is None else _logprobs_to_host(sampled.logprobs)
        self._event: torch.cuda.Event | None = None
        self._execute_us = 0
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._execute_us = round((time.monotonic() - started) * 1e6)

    def done(self) -> bool:
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def result(self) -> StepResult:
        if self._event is not None:
            try:
                self._event.synchronize()
            except RuntimeError as error:
                return FinishedStep.failed(self._step_id, f"the device failed: {error}").result()
            self._execute_us = round((time.monotonic() - self._started) * 1e6)
        if not bool(self._largest.isfinite().all()):
            return FinishedStep.failed(self._step_id, NOT_FINITE).result()
        token_ids = self._token_ids.numpy().astype(np.uint32)
        logprobs = {} if self._logprobs is None else _by_index(self._logprobs)
        result = StepResult(
            self._step_id,
            token_ids,
            logprobs,
            self._execute_us,
            prompt_logprobs=self._prompts.logprobs,
            pooled=self._prompts.pooled,
        )
        if self._accepted is not None:
            self._accepted.narrow(result)
        return result


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host; pinned and not waited for if the tensor is on another device."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _logprobs_to_host(raw: RawLogprobs) -> RawLogprobs:
    return RawLogprobs(
        raw.index, raw.num_top, _to_host(raw.sampled), _to_host(raw.top_ids), _to_host(raw.top_logprobs)
    )


def _by_index(raw: RawLogprobs) -> dict[int, TokenLogprobs]:
    sampled = raw.sampled.tolist()
    top_ids = raw.top_ids.numpy().astype(np.uint32)
    top_logprobs = raw.top_logprobs.numpy()
    return {
        int(index): TokenLogprobs(sampled[i], top_ids[i, :count], top_logprobs[i, :count])
        for i, (index, count) in enumerate(zip(raw.index, raw.num_top, strict=True))
    }
