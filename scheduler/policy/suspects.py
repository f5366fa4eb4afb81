"""Finds the request that makes steps fail, so that only that request ends and all others continue.

When a step fails, or the worker is lost, any request of the steps in flight may be the cause, so all of them
become suspects. A suspect runs alone, in steps of its own and with no other step in flight, until it is past
the furthest position that the lost steps would have computed; then it is cleared. A failure while a suspect
runs alone counts against it, and after MAX_LONE_FAILURES it is quarantined: one failure may be chance (the
worker was killed at that moment), two at the same place are not. If the worker is lost while no step is in
flight, no request is suspected.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable

from scheduler.request import Request, Status, Suspicion
from scheduler.step import InFlight

MAX_LONE_FAILURES = 2
# After this many steps of suspects, or a full token budget of their tokens, the other requests get a step. A
# smaller number would delay the last suspect, a larger one all other requests.
_STEPS_BETWEEN = 8


def accuse(steps: Iterable[InFlight], reached: Callable[[Request], int]) -> list[Request]:
    """Makes all requests of lost steps suspects.

    Args:
        steps: the lost steps, including void ones: their requests may be the cause too. Void steps alone do
            not count as a failure of a request that ran alone, because they fail with the step before them.
        reached: number of a request's tokens that would be computed after all these steps.

    Returns:
        The requests to quarantine: those with MAX_LONE_FAILURES failures.
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
    """The error message for the client of a quarantined request."""
    assert request.suspicion is not None
    return (
        f"this request is quarantined: the engine failed {request.suspicion.num_failures} times while it "
        f"computed nothing else, the last time with: {cause}. Requests beside it were not affected. Do not "
        "send it again unchanged; the server's operator finds more in the engine-worker's log"
    )


class Suspects:
    """The live suspects of one scheduler core, waiting and running. They are not in the core's own queues.

    Attributes:
        step: the step in flight that computes one suspect alone; None if there is none.
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
        """All suspects, in the order in which they are tried."""
        return list(self._all)

    @property
    def running(self) -> list[Request]:
        """The suspects that hold a row."""
        return [request for request in self._all if request.status is Status.RUNNING]

    def add(self, request: Request) -> None:
        """Adds a suspect to the waiting ones. Those with the fewest failures are tried first, so that as few
        requests as possible are delayed by another failure.
        """
        request.status = Status.WAITING
        if request not in self._all:
            insort(self._all, request, key=_order_of_trial)

    def forget(self, request: Request) -> None:
        """Removes a request that has ended."""
        self._all.remove(request)

    def take_turn(self, max_num_batched_tokens: int) -> bool:
        """Whether the next step goes to the other requests, because suspects have used up their turn. If so,
        the suspects' turn starts anew.
        """
        if self._num_steps < _STEPS_BETWEEN and self._num_tokens < max_num_batched_tokens:
            return False
        self._num_steps = self._num_tokens = 0
        return True

    def next(self, is_plannable: Callable[[Request], bool]) -> Request | None:
        """The next suspect to run; suspects that wait for a mask are skipped. None if all do."""
        return next((request for request in self._all if is_plannable(request)), None)

    def tried(self, step: InFlight, start: int, end: int) -> None:
        """Records that a suspect's step is in flight, which computes its tokens from `start` to `end`."""
        self.step, self._end = step, end
        self._num_steps += 1
        self._num_tokens += end - start

    def came_through(self, step: InFlight) -> Request | None:
        """Records that a step succeeded. Returns the suspect that it cleared, if any; that request is no
        longer in here and runs with the others.
        """
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
