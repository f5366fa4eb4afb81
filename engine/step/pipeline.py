"""What a runner does as one stage of a pipeline: hidden states come from the stage before and go to the next,
and sampled tokens go from the last stage to the first."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from engine.attention.interface import IntArray
from engine.dispatch.control import steps_in_flight
from engine.dispatch.records import StepPlan, StepResult
from engine.step.runner import PendingStep

logger = logging.getLogger(__name__)


class StageLink(Protocol):
    """The way to other stages: see engine.parallel.communicator.Communicator, which implements it."""

    def send(self, tensor: torch.Tensor) -> None:
        """To the next stage."""

    def receive(self, tensor: torch.Tensor) -> None:
        """Fills a tensor from the stage before."""

    def return_tokens(self, token_ids: torch.Tensor) -> None:
        """Of the last stage: gives the first one a step's sampled tokens, int64 on the host."""

    def returned_tokens(self, count: int) -> torch.Tensor:
        """Of the first stage: the tokens of the oldest step that they are not here of, int64 [count]."""


@dataclass(frozen=True, slots=True)
class _Sampled:
    """A step whose tokens the last stage samples: the rows, each row's length before, which request it was,
    and the number of the step's plan."""

    rows: IntArray
    places: IntArray
    arrivals: IntArray
    plan: int


class ReturnedTokens:
    """On the first stage: the steps whose sampled tokens have yet to come, and where they belong."""

    def __init__(self, link: StageLink, num_rows: int, num_stages: int) -> None:
        self._link = link
        self._num_in_flight = steps_in_flight(num_stages)
        self._num_plans = 0
        self._steps: deque[_Sampled] = deque()
        # Counts the requests that each row has had.
        self._arrivals = np.zeros(num_rows, np.int64)
        # For each row, the number of the step that samples for it, counted as below.
        self._awaited = np.zeros(num_rows, np.int64)
        self._num_sampled = self._num_returned = 0

    def reset(self) -> None:
        """Forgets all steps, as when the group meets anew."""
        self._steps.clear()
        self._num_plans = self._num_sampled = self._num_returned = 0
        self._awaited[:] = 0

    def sampled(self, rows: IntArray, places: IntArray) -> None:
        """Notes that a step samples a token for each of these rows, in this order, to be put at `places`."""
        if not len(rows):
            return
        self._num_sampled += 1
        self._awaited[rows] = self._num_sampled
        self._steps.append(_Sampled(rows, places, self._arrivals[rows], self._num_plans))

    def needed_by(self, plan: StepPlan) -> list[tuple[IntArray, IntArray, IntArray]]:
        """(rows, places, tokens) of the steps that a plan must not be computed without, and of those that are
        over; waits for them. Call it before the plan is applied.

        Raises:
            RuntimeError: another rank is lost.
        """
        self._num_plans += 1
        over = self._num_plans - self._num_in_flight
        if len(plan.freed_rows):
            self._awaited[plan.freed_rows] = 0
            self._arrivals[plan.freed_rows] += 1
        last = int(self._awaited[plan.rows].max(initial=0))
        found = []
        while self._steps and (self._num_returned < last or self._steps[0].plan <= over):
            step = self._steps.popleft()
            tokens = self._link.returned_tokens(len(step.rows)).numpy()
            self._num_returned += 1
            stayed = self._arrivals[step.rows] == step.arrivals
            found.append((step.rows[stayed], step.places[stayed], tokens[stayed]))
        return found


class ReturningStep:
    """A step of the last stage, whose tokens go to the first one as soon as they are known on the host."""

    def __init__(self, step: PendingStep, count: int, link: StageLink) -> None:
        """`count`: the tokens that the first stage waits for, whatever happens."""
        self._step, self._count, self._link = step, count, link

    def done(self) -> bool:
        return self._step.done()

    def result(self) -> StepResult:
        result = self._step.result()
        if self._count:
            token_ids = torch.zeros(self._count, dtype=torch.int64)
            if not result.error:
                token_ids.copy_(torch.from_numpy(result.token_ids.astype(np.int64)))
            try:
                self._link.return_tokens(token_ids)
            except RuntimeError as error:
                # The first stage is lost. Nobody else needs them: all requests are computed again.
                logger.info("tokens cannot be returned to the first stage: %s", error)
        return result


class PipelineStage:
    """One stage's part in every step, as its runner does it.

    Args:
        link: to the other stages.
        index, count: the stage's place, and how many there are.
        num_rows: rows of the runner.
        hidden_size: numbers of a hidden state.
        max_tokens: of a step, its padding included.
        dtype, device: of hidden states.
    """

    def __init__(
        self,
        link: StageLink,
        index: int,
        count: int,
        *,
        num_rows: int,
        hidden_size: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._link = link
        self.is_first, self.is_last = index == 0, index == count - 1
        self._returned = ReturnedTokens(link, num_rows, count) if self.is_first else None
        # Where graphs read what the stage before has made.
        size = (0 if self.is_first else max_tokens, hidden_size)
        self._input = torch.zeros(size, dtype=dtype, device=device)

    def reset(self) -> None:
        """Forgets the steps of the group that was."""
        if self._returned is not None:
            self._returned.reset()

    def tokens_for(self, plan: StepPlan) -> list[tuple[IntArray, IntArray, IntArray]]:
        """(rows, places, tokens) that belong into the rows before a plan is applied; see ReturnedTokens."""
        return [] if self._returned is None else self._returned.needed_by(plan)

    def input(self, num_tokens: int) -> torch.Tensor | None:
        """Where the hidden states of a step's tokens are, [T, hidden]; None on the first stage."""
        return None if self.is_first else self._input[:num_tokens]

    def receive(self, num_tokens: int) -> None:
        """Waits for the hidden states of a step's tokens, on a GPU in the order of launches."""
        if not self.is_first:
            self._link.receive(self._input[:num_tokens])

    def send(self, hidden: torch.Tensor) -> None:
        """Gives the next stage the hidden states of a step's tokens."""
        self._link.send(hidden)

    def sampled(self, rows: IntArray, places: IntArray) -> None:
        """Of a stage before the last: a step samples for these rows, in the plan's order."""
        if self._returned is not None:
            self._returned.sampled(rows, places)

    def returning(self, step: PendingStep, plan: StepPlan) -> PendingStep:
        """Of the last stage: the step, whose tokens the first stage gets."""
        return ReturningStep(step, int((plan.samples != 0).sum()), self._link)


def make_stage(
    link: StageLink | None,
    index: int,
    count: int,
    *,
    num_rows: int,
    hidden_size: int,
    max_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> PipelineStage | None:
    """The stage of a runner; None where there is only one. See PipelineStage for the arguments."""
    if count == 1 or link is None:
        return None
    return PipelineStage(
        link,
        index,
        count,
        num_rows=num_rows,
        hidden_size=hidden_size,
        max_tokens=max_tokens,
        dtype=dtype,
        device=device,
    )
