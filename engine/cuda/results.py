"""Copies a step's sampled tokens to the host: one asynchronous copy, on a separate stream."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.attention.interface import IntArray
from engine.cuda.device_errors import failed_step
from engine.cuda.logprobs import LogprobsRequest
from engine.cuda.prompt_states import PromptTransfer
from engine.cuda.staging import NUM_TURNS
from engine.dispatch.records import StepResult
from engine.step.accepted import AcceptedSlots
from engine.step.runner import NOT_FINITE, FinishedStep


class ResultBuffers:
    """Buffers that steps use in turns: sampled ids and largest logits of every slot.

    Attributes:
        token_ids: [NUM_TURNS, S] int32, on the device.
        largest: [NUM_TURNS, S] fp32, on the device; see `sample_rows`.
        counts, drafts: with speculation, [NUM_TURNS, S] int32, on the device; see `accept_drafts`.
    """

    def __init__(self, max_num_seqs: int, device: torch.device, *, speculates: bool = False) -> None:
        num_parts = 4 if speculates else 2
        self._device = torch.zeros((NUM_TURNS, num_parts, max_num_seqs), dtype=torch.int32, device=device)
        # Views of nothing where there are no drafts.
        self.counts, self.drafts = self._device[:, 2:3].flatten(1), self._device[:, 3:4].flatten(1)
        if speculates:
            self.counts, self.drafts = self._device[:, 2], self._device[:, 3]
        self.token_ids = self._device[:, 0]
        self.largest = self._device[:, 1].view(torch.float32)
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(self._device.shape, dtype=torch.int32, pin_memory=on_gpu)
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._begun = [_timing_event() for _ in range(NUM_TURNS)] if on_gpu else None
        self._computed = [_timing_event() for _ in range(NUM_TURNS)] if on_gpu else None
        self._copied = [torch.cuda.Event() for _ in range(NUM_TURNS)] if on_gpu else None  # type: ignore[no-untyped-call]

    def begin(self, index: int) -> None:
        """Records the event that marks the step's start on the device."""
        if self._begun is not None:
            self._begun[index].record()

    def collect(
        self,
        index: int,
        step_id: int,
        slots: IntArray,
        logprobs: LogprobsRequest | None,
        prompts: PromptTransfer | None,
        num_slots: IntArray | None = None,
    ) -> LaunchedStep:
        """Starts the copy to the host, after the work launched so far.

        Args:
            index: the step's buffer.
            step_id: the step.
            slots: the slots that sampled, in the order of the result.
            logprobs: the step's log probabilities, if requested.
            prompts: the step's prompt logprobs and pooled states, if requested.
            num_slots: with speculation, how many of the slots each request has, one after the other.
        """
        copied = None
        if self._stream is not None and self._computed is not None and self._copied is not None:
            copied = self._copied[index]
            self._computed[index].record()
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(self._computed[index])
                self._copy(index, logprobs, prompts)
                copied.record()
        else:
            self._copy(index, logprobs, prompts)
        return LaunchedStep(self, index, step_id, slots, logprobs, prompts, copied, num_slots)

    def _copy(self, index: int, logprobs: LogprobsRequest | None, prompts: PromptTransfer | None) -> None:
        self._host[index].copy_(self._device[index], non_blocking=True)
        if logprobs is not None:
            logprobs.to_host()
        if prompts is not None:
            prompts.to_host()

    def sampled(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(token ids, largest logits) of a buffer that has been copied."""
        token_ids, largest = self._host[index, :2].numpy()
        return token_ids, largest.view(np.float32)

    def accepted(self, index: int, slots: IntArray, num_slots: IntArray) -> AcceptedSlots:
        """What the requests of a buffer that has been copied gain, and the drafts that they had."""
        counts, drafts = self._host[index, 2:].numpy()
        first = slots[np.cumsum(num_slots) - num_slots]
        return AcceptedSlots(num_slots, counts[first].astype(np.int64), drafts[first].astype(np.int64))

    def execute_us(self, index: int) -> int:
        """Microseconds that the device spent on a finished step; 0 without a GPU."""
        if self._begun is None or self._computed is None:
            return 0
        milliseconds: float = self._begun[index].elapsed_time(self._computed[index])
        return round(milliseconds * 1000)


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


@dataclass(slots=True)
class LaunchedStep:
    """A step launched on the device; see PendingStep. `launch_us` goes into its result."""

    buffers: ResultBuffers
    index: int
    step_id: int
    slots: IntArray
    logprobs: LogprobsRequest | None
    prompts: PromptTransfer | None
    copied: torch.cuda.Event | None
    num_slots: IntArray | None = None
    launch_us: int = 0

    def done(self) -> bool:
        try:
            return self.copied is None or bool(self.copied.query())  # type: ignore[no-untyped-call]
        except RuntimeError:
            return True  # it failed; `result` returns the error

    def result(self) -> StepResult:
        try:
            return self._result()
        except RuntimeError as error:
            return failed_step(self.step_id, error, self.buffers.token_ids.device).result()

    def _result(self) -> StepResult:
        if self.copied is not None:
            self.copied.synchronize()
        token_ids, largest = self.buffers.sampled(self.index)
        accepted = None
        finite = np.isfinite(largest[self.slots])
        if self.num_slots is not None:
            accepted = self.buffers.accepted(self.index, self.slots, self.num_slots)
            finite |= ~accepted.kept  # nothing was computed there, or nothing is gained
        if not finite.all():
            return FinishedStep.failed(self.step_id, NOT_FINITE).result()
        logprobs = {} if self.logprobs is None else self.logprobs.by_index()
        result = StepResult(
            self.step_id,
            token_ids[self.slots].astype(np.uint32),
            logprobs,
            self.buffers.execute_us(self.index),
            launch_us=self.launch_us,
        )
        if accepted is not None and not accepted.is_one_each:
            accepted.narrow(result)
        if self.prompts is not None:
            result.prompt_logprobs, result.pooled = self.prompts.results()
            if not all(np.isfinite(told.logprobs).all() for told in result.prompt_logprobs):
                return FinishedStep.failed(self.step_id, NOT_FINITE).result()
        return result
