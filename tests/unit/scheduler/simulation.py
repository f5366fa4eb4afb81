"""A service in simulated time: the real core, and a worker of which only the time that it takes is real."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from engine.dispatch.limits import EngineLimits
from engine.dispatch.records import StepPlan, StepResult
from engine.dispatch.sampling import SamplingRecord, u32
from scheduler.core import Scheduler
from scheduler.policy.step_time import StepWork
from scheduler.request import Request
from scheduler.settings import CoreSettings
from scheduler.workers.pacing import Pacing

Cost = Callable[[StepWork], float]


def of_a_gpu(work: StepWork) -> float:
    """10 ms, and 20 us for each prompt token, more the longer its context."""
    return (
        10e-3
        + 20e-6 * work.num_decodes
        + 1e-8 * work.decode_context
        + 20e-6 * work.num_prompt
        + 3e-9 * work.prompt_context
    )


def changed(
    limits: EngineLimits, settings: CoreSettings, changes: dict[str, Any]
) -> tuple[EngineLimits, CoreSettings]:
    """Both with some fields replaced, each where it belongs."""
    of_settings = {name: value for name, value in changes.items() if hasattr(settings, name)}
    of_limits = {name: value for name, value in changes.items() if name not in of_settings}
    return replace(limits, **of_limits), replace(settings, **of_settings)


class SimulatedService:
    """The core, and a worker whose steps take what a function of their work says. Each step is planned so
    long before the one before it is over as pacing.py has it.

    Attributes:
        now: seconds since the start, of a clock that only steps move.
        times: when each request got its tokens.
        added: when each was submitted.
        refused: what had to make room in the queue.
        arrivals: what is still to come, by time: seconds, and what to call then.
    """

    def __init__(self, limits: EngineLimits, cost: Cost, settings: CoreSettings | None = None) -> None:
        self.core = Scheduler(limits, settings)
        self.cost = cost
        self.now = 0.0
        self.times: dict[str, list[float]] = {}
        self.added: dict[str, float] = {}
        self.refused: list[Request] = []
        self.arrivals: deque[tuple[float, Callable[[], object]]] = deque()
        self._plans: deque[StepPlan] = deque()
        self._pacing = Pacing()

    def add(
        self,
        name: str,
        prompt_tokens: int,
        max_tokens: int,
        *,
        client: str = "",
        priority: int = 0,
        timeout: float | None = None,
    ) -> Request:
        """Submits a request whose prompt no other begins with, as far as the vocabulary goes."""
        prompt = array("I", [len(self.times) % self.core.limits.vocab_size] * prompt_tokens)
        request = Request(
            name,
            prompt,
            prompt_tokens,
            SamplingRecord(),
            max_total_tokens=prompt_tokens + max_tokens,
            client=client,
            priority=priority,
        )
        refused = self.core.add(request, timeout=timeout)
        if refused is not None:
            self.refused.append(refused)
        self.times[name] = []
        self.added[name] = self.now
        return request

    def first_token_after(self, name: str) -> float:
        """Seconds from submission to the first token, steps run until then."""
        while not self.times[name]:
            assert self.step()
        return self.times[name][0] - self.added[name]

    def step(self) -> bool:
        """Runs the oldest step in flight; False if there is none."""
        self._arrive(self.now)
        if not self._plans:
            self._plan()
        if not self._plans:
            return False
        plan = self._plans[0]
        work = StepWork()
        for start, count in zip(plan.starts.tolist(), plan.counts.tolist(), strict=True):
            work.add(start, count)
        seconds = self.cost(work)
        self._pacing.began(self.now)
        early = self._pacing.too_early(self.core, self.now)
        self._arrive(self.now + min(max(early, 0.0), seconds))
        if early <= seconds:
            self._plan()
        self.now += seconds
        output = self.core.update(_result(plan, seconds))
        self._plans.popleft()
        self._pacing.ran(round(seconds * 1e6))
        for request in output.requests:
            self.times[request.request_id].append(self.now)
        return True

    def _plan(self) -> None:
        if (plan := self.core.schedule()) is not None:
            self._plans.append(plan)

    def _arrive(self, now: float) -> None:
        while self.arrivals and self.arrivals[0][0] <= now:
            self.arrivals.popleft()[1]()


def _result(plan: StepPlan, seconds: float) -> StepResult:
    return StepResult(plan.step_id, u32([1] * int(plan.samples.sum())), execute_us=round(seconds * 1e6))
