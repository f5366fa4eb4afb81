"""Between the driver and the maker of masks: what goes to whom, and how long a plan waits for masks."""

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
"""The shortest time that is worth a timer."""

MASK_SECONDS = 0.002
"""How long a plan waits for masks, where steps are short, at most."""


class MaskRelay:
    """Has masks made once somebody needs them, for one vocabulary at a time. All of this runs on the event
    loop.

    Args:
        apply: called with what came of a request's tokens.
        plan: plans the next step, and says so by `planned`.
    """

    def __init__(self, apply: Callable[[MaskOutcome], None], plan: Callable[[], None]) -> None:
        self._apply = apply
        self._plan = plan
        self._maker: MaskMaker | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_open(self) -> bool:
        """Whether masks are made already."""
        return self._maker is not None

    def begin(self, request: Request, facts: WorkerFacts) -> None:
        """Takes up a request with a constraint, for this model."""
        self._open(facts).begin(request)

    def prepare(self, facts: WorkerFacts) -> None:
        """Has the model's tokenizer read ahead."""
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
        """Has masks made for what comes after the tokens that requests with constraints have gained."""
        if self._maker is not None and self._maker.num_open:
            for request in output.requests:
                if request.constraint is not None and request.status is not Status.ENDED:
                    self._maker.advance(request)

    def forget(self, request: Request) -> None:
        """Lets a request go that has ended."""
        if self._maker is not None:
            self._maker.forget(request)

    def _take(self) -> None:
        for outcome in self._maker.take() if self._maker is not None else ():
            self._apply(outcome)
        self.plan_with_masks(MASK_SECONDS)

    def plan_with_masks(self, most_seconds: float) -> None:
        """Plans once no mask is being made any more, or so much later, so that requests that were sampled
        together are sampled together again.
        """
        if self._maker is None or self._maker.num_awaited == 0 or most_seconds < LEAST_SECONDS:
            self._plan()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(most_seconds, self._plan)

    def planned(self) -> None:
        """There is a plan; none is to be made later."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """Ends the making of masks; what was begun gets none. `begin` and `prepare` begin again."""
        if self._maker is not None:
            self._maker.close()
            self._maker = None
