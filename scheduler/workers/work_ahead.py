"""When workers do what only makes later steps faster, such as capturing graphs.

They do it when a plan says so, all ranks of a group between the same two steps, so that what they send each
other meanwhile meets. While nobody has a request open, one piece follows the other: whoever comes waits for
no more than one. Otherwise there is one every WORK_AHEAD_SECONDS.
"""

from __future__ import annotations

from engine.dispatch.control import WORK_AHEAD_STEP
from engine.dispatch.records import StepPlan
from engine.dispatch.sampling import u32

# Between two pieces while steps follow each other without a pause: a piece is half a percent of it.
WORK_AHEAD_SECONDS = 5.0


def work_ahead_plan() -> StepPlan:
    """Has the workers do one piece."""
    empty = u32([])
    return StepPlan(WORK_AHEAD_STEP, empty, [], empty, empty, empty, empty, empty, empty, work_ahead=True)


class WorkAhead:
    """What the workers of one attachment have left to do ahead.

    Args:
        more: whether there is anything.

    Attributes:
        more: the same, now.
        in_flight: whether a piece of it is being done.
    """

    def __init__(self, more: bool) -> None:
        self.more = more
        self.in_flight = False
        self._next = 0.0

    def is_due(self, now: float, *, is_idle: bool) -> bool:
        """Whether the next piece is to be sent.

        Args:
            now: seconds of any clock.
            is_idle: nobody has a request open.
        """
        return self.more and not self.in_flight and (is_idle or now >= self._next)

    def sent(self, now: float) -> None:
        """A piece was sent."""
        self.in_flight = True
        self._next = now + WORK_AHEAD_SECONDS

    def finished(self, more: bool) -> None:
        """It is done, and there is more or not."""
        self.in_flight, self.more = False, more
