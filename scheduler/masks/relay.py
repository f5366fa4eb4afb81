"""Connects the driver to the mask maker, and decides how long a plan waits for masks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from engine.dispatch.facts import WorkerFacts
from scheduler.request import Request, Status
from scheduler.step import StepOutput

if TYPE_CHECKING:
    from scheduler.masks.maker import MaskMaker, MaskOutcome

LEAST_SECONDS = 0.001
"""Shorter delays than this are not worth a timer."""

MASK_SECONDS = 0.002
"""The longest that a plan waits for masks, where steps are short."""


class MaskRelay:
    """Owns the mask maker, which it creates when the first request needs it, for one vocabulary at a time.
    Runs on the event loop.

    Args:
        apply: called with each mask outcome.
        plan: plans the next step, and calls `planned`.
    """

    def __init__(self, apply: Callable[[MaskOutcome], None], plan: Callable[[], None]) -> None:
        self._apply = apply
        self._plan = plan
        self._maker: MaskMaker | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is a mask maker."""
        return self._maker is not None

    def begin(self, request: Request, facts: WorkerFacts) -> None:
        """Starts computing masks for a constrained request of this model."""
        self._open(facts).begin(request)

    def prepare(self, facts: WorkerFacts) -> None:
        """Loads the model's tokenizer ahead of the first constrained request."""
        self._open(facts).prepare()

    def _open(self, facts: WorkerFacts) -> MaskMaker:
        if self._maker is None:
            from scheduler.masks.maker import (
                MaskMaker,  # a tenth of what a scheduler imports, and seldom needed
            )

            loop = asyncio.get_running_loop()

            def wake() -> None:
                with suppress(RuntimeError):  # the loop is closed: the process ends
                    loop.call_soon_threadsafe(self._take)

            self._maker = MaskMaker(facts, wake)
        return self._maker

    def advance(self, output: StepOutput) -> None:
        """Starts computing the next masks of constrained requests that gained a token in a step."""
        if self._maker is not None and self._maker.num_open:
            for request in output.requests:
                if request.constraint is not None and request.status is not Status.ENDED:
                    self._maker.advance(request)

    def forget(self, request: Request) -> None:
        """Drops the masks of a request that has ended."""
        if self._maker is not None:
            self._maker.forget(request)

    def _take(self) -> None:
        for outcome in self._maker.take() if self._maker is not None else ():
            self._apply(outcome)
        self.plan_with_masks(MASK_SECONDS)

    def plan_with_masks(self, most_seconds: float) -> None:
        """Plans when no awaited mask is left, at most `most_seconds` from now, so that requests that were
        sampled in one step are sampled in one step again.
        """
        if self._maker is None or self._maker.num_awaited == 0 or most_seconds < LEAST_SECONDS:
            self._plan()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(most_seconds, self._plan)

    def planned(self) -> None:
        """Cancels the delayed plan, because a step has been planned."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """Closes the mask maker; pending masks are dropped. `begin` and `prepare` open a new one."""
        if self._maker is not None:
            self._maker.close()
            self._maker = None
