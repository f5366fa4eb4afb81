"""Finds the request that makes steps fail, so that it alone ends and all others live.

When a step fails, or the worker is lost, every request of the steps in flight may be the one at fault: they
become suspects. A suspect is computed in steps of its own, with no other step in flight, until it is past
the furthest position that those steps would have computed; then it is cleared. A failure with nobody else in
flight counts against the suspect, and at MAX_LONE_FAILURES it is quarantined: one may be chance (somebody
killed the worker in that moment), two at the same place are not. A worker lost with no step in flight is no
request's doing.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable

from scheduler.request import Request, Status, Suspicion
from scheduler.step import InFlight

MAX_LONE_FAILURES = 2
# After so many of suspects' steps, or a full step's worth of their tokens, the others get a step. Fewer would
# make the last suspect wait for longer, more everybody else.
_STEPS_BETWEEN = 8


def accuse(steps: Iterable[InFlight], reached: Callable[[Request], int]) -> list[Request]:
    """Makes suspects of all requests of steps that were lost.

    Args:
        steps: void ones too, whose requests may be at fault as well; as evidence against one request alone
            they do not count, because they fail whenever the step before has failed.
        reached: how many tokens of a request the steps would have computed at the end.

    Returns:
        The requests that have failed alone once too often.
    """
    steps = list(steps)
    accused = {request: None for step in steps for request in step.scheduled}
    is_alone = len(accused) == 1 and not all(step.void for step in steps)
    condemned = []
    for request in accused:
        if request.status is Status.ENDED:
            continue
        suspicion = request.suspicion = request.suspicion or Suspicion()
        suspicion.past = max(suspicion.past, reached(request))
        suspicion.num_failures += is_alone
        if suspicion.num_failures >= MAX_LONE_FAILURES:
            condemned.append(request)
    return condemned


def verdict(request: Request, cause: str) -> str:
    """What a quarantined request's client is told."""
    assert request.suspicion is not None
    return (
        f"this request is quarantined: the engine failed {request.suspicion.num_failures} times while it "
        f"computed nothing else, the last time with: {cause}. Requests beside it were not affected. Do not "
        "send it again unchanged; the server's operator finds more in the engine-worker's log"
    )


class Suspects:
    """The live suspects of one scheduler core, those that wait and those that hold a row. They are in none of
    the core's own queues.

    Attributes:
        step: the step in flight that computes one of them, alone; None if there is none.
    """

    def __init__(self) -> None:
        self._all: list[Request] = []
        self._num_steps = self._num_tokens = 0
        self._end = 0
        self.step: InFlight | None = None

    def __len__(self) -> int:
        return len(self._all)

    @property
    def all(self) -> list[Request]:
        """Every one of them."""
        return list(self._all)

    @property
    def running(self) -> list[Request]:
        """Those that hold a row."""
        return [request for request in self._all if request.status is Status.RUNNING]

    def add(self, request: Request) -> None:
        """Has a suspect wait. The one that looks most innocent is tried first, so that as few as possible
        see the engine fail again.
        """
        request.status = Status.WAITING
        if request not in self._all:
            insort(self._all, request, key=_order_of_trial)

    def forget(self, request: Request) -> None:
        """Takes out what has ended."""
        self._all.remove(request)

    def take_turn(self, max_num_batched_tokens: int) -> bool:
        """Whether the next step is for others than suspects, because suspects have had theirs."""
        if self._num_steps < _STEPS_BETWEEN and self._num_tokens < max_num_batched_tokens:
            return False
        self._num_steps = self._num_tokens = 0
        return True

    def next(self, is_plannable: Callable[[Request], bool]) -> Request | None:
        """Whose step is next; a suspect that waits for a mask is passed over."""
        return next((request for request in self._all if is_plannable(request)), None)

    def tried(self, step: InFlight, start: int, end: int) -> None:
        """A step of one of them is in flight, which computes its tokens from `start` to `end`."""
        self.step, self._end = step, end
        self._num_steps += 1
        self._num_tokens += end - start

    def came_through(self, step: InFlight) -> Request | None:
        """Takes notice of a step that succeeded; the suspect that it cleared, which runs on as others do."""
        if step is not self.step:
            return None
        self.step = None
        request = step.scheduled[0]
        if request.suspicion is None or request.status is Status.ENDED or self._end < request.suspicion.past:
            return None
        request.suspicion = None
        self._all.remove(request)
        return request


def _order_of_trial(request: Request) -> tuple[int, tuple[int, int]]:
    assert request.suspicion is not None
    return (request.suspicion.num_failures, request.order)
