"""Decides when workers do optional work that makes later steps faster, such as CUDA graph capture.

A plan tells the workers to do one piece of it, so that all ranks of a group do it between the same two steps
and their collectives match. While no request is open, pieces follow each other directly; a new request waits
for at most one. Otherwise there is one piece every WORK_AHEAD_SECONDS.
"""

from __future__ import annotations

from engine.dispatch.control import WORK_AHEAD_STEP
from engine.dispatch.records import StepPlan
from engine.dispatch.sampling import u32

# Seconds between two pieces while requests are open; a piece takes half a percent of this.
WORK_AHEAD_SECONDS = 5.0


def work_ahead_plan() -> StepPlan:
    """A plan that makes the workers do one piece of work ahead."""
    empty = u32([])
    return StepPlan(WORK_AHEAD_STEP, empty, [], empty, empty, empty, empty, empty, empty, work_ahead=True)


class WorkAhead:
    """The state of the work ahead of one attachment's workers.

    Args:
        more: whether there is work to do at the start.

    Attributes:
        more: whether there is work left.
        in_flight: whether a piece is being done.
    """

    def __init__(self, more: bool) -> None:
        self.more = more
        self.in_flight = False
        self._next = 0.0

    def is_due(self, now: float, *, is_idle: bool) -> bool:
        """Whether to send the next piece now.

        Args:
            now: seconds of any clock.
            is_idle: whether no request is open.
        """
        return self.more and not self.in_flight and (is_idle or now >= self._next)

    def sent(self, now: float) -> None:
        """Records that a piece was sent."""
        self.in_flight = True
        self._next = now + WORK_AHEAD_SECONDS

    def finished(self, more: bool) -> None:
        """Records that a piece is done, and whether there is more."""
        self.in_flight, self.more = False, more
