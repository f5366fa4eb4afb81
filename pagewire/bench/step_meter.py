"""What the steps of an engine did while something was measured, as its scheduler core saw them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from engine.dispatch.records import StepPlan, StepResult
from scheduler.core import Scheduler
from scheduler.step import StepOutput

Listener = Callable[[float, StepOutput], None]


@dataclass(slots=True)
class _Kind:
    """Totals of the steps of one kind."""

    count: int = 0
    requests: int = 0
    tokens: int = 0
    execute_us: int = 0

    def add(self, requests: int, tokens: int, execute_us: int) -> None:
        self.count += 1
        self.requests += requests
        self.tokens += tokens
        self.execute_us += execute_us

    def means(self) -> dict[str, float]:
        """How many steps there were, and their means."""
        count = max(self.count, 1)
        return {
            "count": self.count,
            "mean_requests": round(self.requests / count, 1),
            "mean_tokens": round(self.tokens / count, 1),
            "mean_execute_us": round(self.execute_us / count, 1),
        }


class StepMeter:
    """Watches a core's `schedule` and `update` inside a `with` block; costs a few microseconds a step.

    Args:
        core: planned and updated by the thread that uses the meter.
        listener: told of every step's output, with the time (`time.perf_counter`) at which it was known.
    """

    def __init__(self, core: Scheduler, listener: Listener | None = None) -> None:
        self._core = core
        self._listener = listener
        self._schedule, self._update = core.schedule, core.update
        self._planned: dict[int, tuple[int, int]] = {}
        self._decode, self._prefill = _Kind(), _Kind()
        self._schedule_seconds = self._update_seconds = 0.0
        self._least_free = core.pool.num_free
        self._before = core.counters.snapshot()

    def __enter__(self) -> StepMeter:
        self._core.schedule = self._metered_schedule  # type: ignore[method-assign]
        self._core.update = self._metered_update  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        del self._core.schedule, self._core.update  # the class's own are found again

    def _metered_schedule(self) -> StepPlan | None:
        began = time.perf_counter()
        plan = self._schedule()
        self._schedule_seconds += time.perf_counter() - began
        if plan is not None:
            self._planned[plan.step_id] = (len(plan.counts), int(plan.counts.sum()))
            self._least_free = min(self._least_free, self._core.pool.num_free)
        return plan

    def _metered_update(self, result: StepResult) -> StepOutput:
        began = time.perf_counter()
        output = self._update(result)
        now = time.perf_counter()
        self._update_seconds += now - began
        requests, tokens = self._planned.pop(result.step_id)
        kind = self._decode if tokens == requests else self._prefill
        kind.add(requests, tokens, result.execute_us)
        if self._listener is not None:
            self._listener(now, output)
        return output

    def report(self, elapsed: float) -> dict[str, Any]:
        """Totals and means since the meter was made.

        A decode step computes one token for each of its requests; every other is a prefill step.
        `execute_us` is the worker's time from launching a step to its result: with one step planned ahead it
        includes waiting for the step before. `step_us` is elapsed time over steps, the step's true period.
        `schedule_us` and `update_us` are the core's own time a step, in this process.

        Args:
            elapsed: seconds that the measured work took.
        """
        totals = asdict(self._core.counters.since(self._before))
        count = max(self._decode.count + self._prefill.count, 1)
        return {
            **totals,
            "step_us": round(elapsed / count * 1e6, 1),
            "mean_execute_us": round((self._decode.execute_us + self._prefill.execute_us) / count, 1),
            "schedule_us": round(self._schedule_seconds / count * 1e6, 1),
            "update_us": round(self._update_seconds / count * 1e6, 1),
            "most_blocks_used": self._core.pool.num_blocks - self._least_free,
            "decode_steps": self._decode.means(),
            "prefill_steps": self._prefill.means(),
        }
