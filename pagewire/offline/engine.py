"""The engine of one program: worker processes of its own and the scheduler core in this process.

The same worker, dispatch and core as in the service; only the sockets to clients are missing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

from engine.config import WorkerConfig
from engine.dispatch.control import (
    ADAPTER_STEP,
    NUM_FIRST_STEPS,
    WORK_AHEAD_STEP,
    WorkerGone,
    steps_in_flight,
)
from engine.dispatch.facts import WorkerFacts
from engine.dispatch.link import WorkerLink
from engine.dispatch.records import StepResult
from pagewire.offline.adapters import OfflineAdapters
from pagewire.offline.idle_work import IdleWork
from pagewire.offline.workers import OfflineWorkers
from scheduler.core import Scheduler
from scheduler.masks.maker import MaskMaker, MaskOutcome
from scheduler.request import EndReason, Request, Status
from scheduler.settings import CoreSettings
from scheduler.step import StepOutput
from scheduler.workers.group import GroupResults
from scheduler.workers.pacing import Pacing
from scheduler.workers.watchdog import FIRST_STEPS_FACTOR
from scheduler.workers.work_ahead import WorkAhead, work_ahead_plan

# Seconds that a step may take; as of a service.
STEP_TIMEOUT = 120.0
_STOP_SECONDS = 10.0


class OfflineEngine:
    """Owns the worker processes, the link to them and the core. Not for use from several threads.

    Attributes:
        facts: of the worker.
        adapters: that it has.
    """

    def __init__(
        self,
        worker: WorkerConfig,
        *,
        settings: CoreSettings,
        step_timeout: float = STEP_TIMEOUT,
    ) -> None:
        """Starts the worker and waits until it has loaded the model. `worker.socket` is not looked at.

        Args:
            worker: the worker's configuration.
            settings: the core's.
            step_timeout: seconds after which a worker that has not finished a step counts as hung; five times
                as many for its first steps.

        Raises:
            ConfigError: the worker refuses its configuration or the model.
            Unavailable: it died while it started.
        """
        self._workers = OfflineWorkers(worker)
        self._link: WorkerLink | None = None
        try:
            link = self._workers.connect()
            self._attach(link, settings, step_timeout)
            self._idle.begin()
        except BaseException:
            self._stop()
            raise

    def _attach(self, link: WorkerLink, settings: CoreSettings, step_timeout: float = STEP_TIMEOUT) -> None:
        self._link, self._results = link, GroupResults(link)
        self._most_in_flight = steps_in_flight(link.facts.num_stages)
        self._step_timeout = step_timeout
        self._num_finished, self._began = 0, 0.0
        self._ahead = WorkAhead(link.facts.more_ahead)
        self._idle = IdleWork(link, self._results, self._ahead)
        self.facts: WorkerFacts = link.facts
        self.core = Scheduler(self.facts.limits, settings, num_stages=link.facts.num_stages)
        self.adapters = OfflineAdapters(self.core, self.facts.limits.max_loras)
        self._mask_ready = threading.Event()
        self._pacing = Pacing(link.facts.num_stages)
        self._masks = MaskMaker(self.facts, self._mask_ready.set)

    @property
    def _limit(self) -> float:
        """Seconds that a step may take."""
        return self._step_timeout * (FIRST_STEPS_FACTOR if self._num_finished < NUM_FIRST_STEPS else 1)

    def check(self, request: Request) -> None:
        """Checks a request, and compiles its constraint; not while `steps` runs.

        Raises:
            PagewireError: it could never be served.
        """
        self.core.check(request)
        if request.constraint is not None:
            self._masks.check(request.constraint)

    def add(self, request: Request) -> None:
        """Queues a request for `steps`. Once it has ended, `Request.end_reason` says why.

        Raises:
            InvalidRequest: it could never be served.
        """
        self.core.add(request)
        self.core.overdue(request)  # nobody else will come to fill its batch
        if request.constraint is not None:
            self._masks.begin(request)

    def steps(self) -> Iterator[StepOutput]:
        """Runs steps, one planned ahead, and yields their outputs until nothing is left to compute.

        Raises:
            Unavailable: the worker died, or hung and was killed.
        """
        assert self._link is not None
        if not self._idle.end(self._limit):
            raise self._workers.hung("work ahead of steps")
        while True:
            if self._masks.num_under_way and (ended := self._take_masks()):
                yield StepOutput(ended=ended)
            while (
                self.core.num_in_flight < self._most_in_flight
                and not self._pacing.holds_back(self.core)
                and (plan := self.core.schedule()) is not None
            ):
                if self.core.num_in_flight == 1:
                    self._began = time.monotonic()
                self._link.send_plan(plan)
            self.core.take_admitted()  # which would be kept for ever; what was cached is told with the output
            self._plan_ahead()
            self._plan_adapters()
            if self.core.num_in_flight or self.adapters.in_flight:
                result = self._next_result()
                if result is not None:
                    output = self.core.update(result)
                    self._pacing.ran(result.execute_us)
                    self._advance_masks(output)
                    yield output
            elif self._masks.num_under_way:
                self._mask_ready.wait()
            else:
                self._idle.begin()
                return

    def _plan_ahead(self) -> None:
        """Has the worker do a piece of work that makes later steps faster, if it is time for one."""
        assert self._link is not None
        now = time.monotonic()
        if self._ahead.is_due(now, is_idle=False):
            self._link.send_plan(work_ahead_plan())
            self._ahead.sent(now)

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Has the workers load an adapter; not while `steps` runs.

        Raises:
            ConfigError, InvalidRequest: there is none at the path, it does not fit, or the name is taken.
            Unsupported: the workers take no adapters.
            Unavailable: the worker died.
        """
        facts = self.adapters.begin_load(name, path)
        for _ in self.steps():
            pass
        self.adapters.loaded(facts)

    def unload_adapter(self, name: str) -> None:
        """Has the workers forget an adapter; not while `steps` runs.

        Raises:
            NotFound: there is none of this name.
            Unsupported: the workers take no adapters.
            Unavailable: the worker died.
        """
        self.adapters.begin_unload(name)
        for _ in self.steps():
            pass

    def _plan_adapters(self) -> None:
        """Has the workers do what there is to do with adapters."""
        assert self._link is not None
        if (plan := self.adapters.next_plan()) is not None:
            if not self.core.num_in_flight:
                self._began = time.monotonic()
            self._link.send_plan(plan)

    def _next_result(self) -> StepResult | None:
        """The result of the oldest step in flight; None if it is not there yet."""
        assert self._link is not None
        seconds = self._began + self._limit - time.monotonic()
        try:
            result = self._results.wait(max(0.0, seconds))
        except WorkerGone:
            raise self._workers.died() from None
        now = time.monotonic()
        if result is None:
            if now >= self._began + self._limit:
                limit = f"after {now - self._began:.1f} s (step_timeout is {self._step_timeout:g})"
                late = [rank.facts.rank for rank in self._results.late_ranks()]
                step = self.core.describe_oldest() if self.core.num_in_flight else "work with an adapter"
                what = f"{step}, {limit},"
                raise self._workers.hung(what, late[0] if len(late) == 1 else None)
            return None
        self._began = now
        if result.step_id == WORK_AHEAD_STEP:
            self._ahead.finished(result.more_ahead)
            return None
        if result.step_id == ADAPTER_STEP:
            self.adapters.finished(result)
            return None
        self._num_finished += 1
        return result

    def _advance_masks(self, output: StepOutput) -> None:
        if self._masks.num_open:
            for request in output.requests:
                if request.constraint is not None and request.status is not Status.ENDED:
                    self._masks.advance(request)
            for request in output.ended:
                self._masks.forget(request)

    def _take_masks(self) -> list[Request]:
        """Lets requests go on whose masks are ready; returns those that have ended instead. While the worker
        has something to do it waits for more, so that requests sampled together are sampled together again.
        """
        ended: list[Request] = []
        while True:
            self._mask_ready.clear()
            ended += filter(None, map(self._apply, self._masks.take()))
            if not self._masks.num_awaited or not self._mask_ready.wait(self._pacing.patience(self.core)):
                return ended

    def _apply(self, outcome: MaskOutcome) -> Request | None:
        """Gives a request its mask, or returns it as ended."""
        request, error = outcome.request, outcome.error
        if outcome.mask is not None:
            self.core.allow(request, outcome.mask)
            return None
        reason = EndReason.STOP if error is None else EndReason.ERROR
        self.core.abort(request, reason, "" if error is None else error.message)
        self._masks.forget(request)
        return request

    def abort(self, requests: list[Request]) -> None:
        """Ends requests that are still open, as when the caller was interrupted."""
        for request in requests:
            self.core.abort(request)
            self._masks.forget(request)

    def close(self) -> None:
        """Stops the worker."""
        self._masks.close()
        self._stop()

    def _stop(self) -> None:
        self._workers.stop()
        if self._link is not None:
            self._idle.end(_STOP_SECONDS)  # at once, as the workers have ended
            self._link.close()
            self._link = None
        self._workers.close()
