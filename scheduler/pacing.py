"""When a step is planned ahead, and when it waits for masks instead.

A constrained request's next token can be planned once its last one is known and has its mask. Planned ahead
of that, a step leaves those requests out that the step before samples, so that each gains a token in every
other step. Beside free requests that is how it is: they would lose the time between two steps. Where nobody
but constrained requests runs, they take every step together.
"""

from __future__ import annotations

from scheduler.core import Scheduler

MASK_SECONDS = 0.002
"""How long a plan waits for masks, where steps are short, at most."""

_SHARE_FOR_THE_LAST = 0.1
"""Of a step's time, that those who take it together wait for the last of them: left out, it would lose it."""


class Pacing:
    """Remembers how long steps take."""

    def __init__(self) -> None:
        self._step_seconds = 0.0

    def ran(self, execute_us: int) -> None:
        """A step took so long in the worker."""
        self._step_seconds = execute_us * 1e-6

    def holds_back(self, core: Scheduler) -> bool:
        """Whether no step is to be planned before the results of those in flight are there."""
        return core.num_in_flight > 0 and core.awaits_masked_tokens and core.all_are_constrained

    def patience(self, core: Scheduler) -> float:
        """How many seconds the next plan may wait for masks: while the worker has a step to do that takes, if
        it is like the last, twice as long; and where constrained requests take every step.
        """
        if core.num_in_flight:
            return min(self._step_seconds / 2, MASK_SECONDS)
        if core.all_are_constrained:
            return max(MASK_SECONDS, self._step_seconds * _SHARE_FOR_THE_LAST)
        return 0.0
