"""Decides when the next step is planned: ahead of time, how long before it is needed, or only after masks.

The worker gets its next step while it computes one, but only shortly before that one is over, so that a
request that arrives meanwhile is in the next step and not in the one after it. If prompts fill the steps, a
new request would find no room, so there is nothing to wait for.

A constrained request can be planned once its last token is known and the mask for the next one is ready. A
step that is planned earlier leaves out the constrained requests that the previous step samples, so each of
them gets a token in every other step only. That is accepted while unconstrained requests run too, because
waiting would leave the device idle between steps. If only constrained requests run, plans wait for masks and
each of them is in every step.
"""

from __future__ import annotations

from scheduler.core import Scheduler
from scheduler.masks.relay import MASK_SECONDS

_SHARE_FOR_THE_LAST = 0.1
"""The share of a step's time that a plan waits for the last mask, if only constrained requests run: a request
that is left out loses a whole step."""

_LEAD_SECONDS = 0.004
"""The next step is planned at least this long, plus its launch time, before the current one is over."""

_LEAD_SHARE = 0.25
"""The same as a share of the step's time, because the prediction may be off by this much."""

_LAUNCH_KEPT = 0.95
"""The estimate of the launch time falls by at most this factor per step."""


class Pacing:
    """Remembers how long steps take, and when the worker began the oldest step in flight."""

    def __init__(self, num_stages: int = 1) -> None:
        """`num_stages`: of the pipeline that the worker's ranks are. Several stages compute as many steps at
        once; plans then go out as soon as there may be another one.
        """
        self._is_pipeline = num_stages > 1
        self._step_seconds = 0.0
        self._launch_seconds = 0.0
        self._began = 0.0

    def began(self, now: float) -> None:
        """Records that the worker began the oldest step in flight at `now`, seconds of any clock."""
        self._began = now

    def ran(self, execute_us: int, launch_us: int = 0) -> None:
        """Records a step's execution time and launch time, in microseconds."""
        self._step_seconds = execute_us * 1e-6
        self._launch_seconds = max(launch_us * 1e-6, self._launch_seconds * _LAUNCH_KEPT)

    def too_early(self, core: Scheduler, now: float) -> float:
        """Seconds to wait before the next step is planned; 0 or less means now."""
        if self._is_pipeline:
            return 0.0
        work = core.oldest_work
        if work is None or core.is_full or (self._step_seconds < _LEAD_SECONDS and not work.num_prompt):
            return 0.0
        seconds = core.step_times.predict(work)
        lead = max(_LEAD_SECONDS, _LEAD_SHARE * seconds) + self._launch_seconds
        return self._began + seconds - lead - now

    def holds_back(self, core: Scheduler) -> bool:
        """Whether planning must wait for the results of the steps in flight."""
        return (
            not self._is_pipeline
            and core.num_in_flight > 0
            and core.awaits_masked_tokens
            and core.all_are_constrained
        )

    def patience(self, core: Scheduler) -> float:
        """Seconds that the next plan may wait for masks: up to half of the last step's time while the worker
        has a step to compute, and longer if only constrained requests run; else 0.
        """
        if core.num_in_flight:
            return min(self._step_seconds / 2, MASK_SECONDS)
        if core.all_are_constrained:
            return max(MASK_SECONDS, self._step_seconds * _SHARE_FOR_THE_LAST)
        return 0.0
