"""When a step is planned ahead, how late, and when it waits for masks instead.

The worker gets its next step while it computes one, but not long before that one is over: whoever comes
meanwhile is in the next step, not in the one after it. Where prompts fill the steps there is no room for
whoever comes, and nothing to wait for.

A constrained request's next token can be planned once its last one is known and has its mask. Planned ahead
of that, a step leaves those requests out that the step before samples, so that each gains a token in every
other step. Beside free requests that is how it is: they would lose the time between two steps. Where nobody
but constrained requests runs, they take every step together.
"""

from __future__ import annotations

from scheduler.core import Scheduler
from scheduler.masks.relay import MASK_SECONDS

_SHARE_FOR_THE_LAST = 0.1
"""Of a step's time, that those who take it together wait for the last of them: left out, it would lose it."""

_LEAD_SECONDS = 0.004
"""How long before a step is over the next one is planned, at least, apart from the time to launch it."""

_LEAD_SHARE = 0.25
"""The same in parts of the step's time: it may be over so much earlier than it was expected to be."""

_LAUNCH_KEPT = 0.95
"""What a step's launch is at least taken to need, in parts of what was so taken for the step before it."""


class Pacing:
    """Remembers how long steps take, and since when the worker is at the oldest."""

    def __init__(self) -> None:
        self._step_seconds = 0.0
        self._launch_seconds = 0.0
        self._began = 0.0

    def began(self, now: float) -> None:
        """The worker has gone on to the oldest step in flight, seconds of any clock."""
        self._began = now

    def ran(self, execute_us: int, launch_us: int = 0) -> None:
        """A step took so long in the worker, and so long before the device had all of it."""
        self._step_seconds = execute_us * 1e-6
        self._launch_seconds = max(launch_us * 1e-6, self._launch_seconds * _LAUNCH_KEPT)

    def too_early(self, core: Scheduler, now: float) -> float:
        """For how many seconds the next step had better not be planned yet; 0 or less: it is time."""
        work = core.oldest_work
        if work is None or core.is_full or (self._step_seconds < _LEAD_SECONDS and not work.num_prompt):
            return 0.0
        seconds = core.step_times.predict(work)
        lead = max(_LEAD_SECONDS, _LEAD_SHARE * seconds) + self._launch_seconds
        return self._began + seconds - lead - now

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
