"""The engine-worker process: loads a model once, then serves one scheduler after another."""

from __future__ import annotations

import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING

from engine.config import WorkerConfig
from engine.dispatch.adapters import AdapterCommand
from engine.dispatch.control import (
    MAX_STEPS_IN_FLIGHT,
    SchedulerGone,
    WorkerEndpoint,
    WorkerSession,
    rank_socket,
)
from engine.dispatch.records import StepPlan, StepResult
from engine.dispatch.sampling import RecordError, u32
from engine.step.runner import DeviceLost, FinishedStep, LoadedWorker, PendingStep
from engine.worker.requests import OpenRequests
from engine.worker.timeline import Timeline
from pagewire.base.errors import ConfigError
from pagewire.base.exit_status import DEVICE_LOST
from pagewire.base.gc_freeze import spare_what_is_loaded
from pagewire.base.notify import notify_ready
from pagewire.telemetry.spans import span_writer

if TYPE_CHECKING:
    from engine.worker.profiling import StepProfiler

# Steps launched and not finished. A stage of a pipeline may have more plans than that.
MOST_LAUNCHED = MAX_STEPS_IN_FLIGHT + 1

logger = logging.getLogger(__name__)

# Between two looks at a device that is computing while no plan is there.
POLL_SECONDS = 20e-6


class _Terminated(BaseException):
    """SIGTERM or SIGINT, raised where no step is running."""


class _Termination:
    """Turns SIGTERM and SIGINT into _Terminated, but never in the middle of a step.

    The handler raises at once while the worker waits; during a step it only notes the signal, which
    `step` raises when the step is over.
    """

    def __init__(self) -> None:
        self._requested = False
        self._in_step = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around work that must not be interrupted."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False
        if self._requested:
            raise _Terminated

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        if not self._in_step:
            raise _Terminated


def run(config: WorkerConfig, build: Callable[[], LoadedWorker], timeline: Timeline) -> int:
    """Loads the model, listens, and serves schedulers until SIGTERM or SIGINT, or until the device is lost;
    the exit status.

    Args:
        config: what this worker runs.
        build: makes what runs it.
        timeline: of the process's start, for the log.

    Raises:
        ConfigError: a setting or a model file is wrong, or the socket cannot be bound.
    """
    try:
        termination = _Termination()
        worker = build()
        profiler = _profiler(config)
        # All ranks compute the same requests: one of them tells.
        spans = span_writer(None if config.rank else config.otlp_traces_endpoint, "engine-worker")
        requests = OpenRequests(spans)
        path = rank_socket(config.socket, config.rank)
        try:
            endpoint = WorkerEndpoint(path)
        except OSError as error:
            raise ConfigError(f"cannot listen on {path}: {error}") from error
        try:
            spare_what_is_loaded()
            notify_ready(f"{worker.facts.model} on {worker.facts.device}")
            logger.info("listening on %s", path)
            logger.info("%s", timeline)
            serving = _Serving(worker, termination, profiler, requests)
            while True:
                serving.serve(endpoint)
        finally:
            endpoint.close()
            requests.reset()
            if spans is not None:
                spans.close()
    except _Terminated:
        logger.info("terminated")
        return 0
    except DeviceLost as error:
        logger.critical("the device is lost, ending with status %d: %s", DEVICE_LOST, error)
        return DEVICE_LOST


def _profiler(config: WorkerConfig) -> StepProfiler | None:
    if config.profile is None:
        return None
    from engine.worker.profiling import StepProfiler  # imports torch

    return StepProfiler(config.profile, config.profile_from, config.profile_steps)


class _Serving:
    """Executes the plans of one scheduler after another."""

    def __init__(
        self,
        worker: LoadedWorker,
        termination: _Termination,
        profiler: StepProfiler | None,
        requests: OpenRequests,
    ) -> None:
        self._runner, self._facts, self._group = worker.runner, worker.facts, worker.group
        self._met = worker.met
        self._reports = worker.facts.rank == worker.facts.reporting_rank
        self._adapters = worker.adapters
        self._termination = termination
        self._profiler = profiler
        self._requests = requests
        self._more_ahead = True  # as far as is known
        self._pending: deque[PendingStep] = deque()

    def serve(self, endpoint: WorkerEndpoint) -> None:
        """Waits for a scheduler and executes its plans until it goes; then forgets its requests and keeps the
        weights. A rank meets the others of its group before.
        """
        # Graphs of a rank are captured again whenever its group has met.
        facts = replace(self._facts, more_ahead=self._more_ahead or self._met is not None)
        if self._adapters is not None:
            facts = replace(facts, adapters=self._adapters.loaded)
        session = endpoint.accept(facts, None if self._group is None else self._join)
        logger.info("serving scheduler %d", session.scheduler_pid)
        try:
            if self._group is not None:
                self._group.watch(session.control_fd)
            self._execute_plans(session)
        except SchedulerGone:
            logger.info("scheduler %d is gone", session.scheduler_pid)
        except RecordError as error:
            # The two sides no longer agree on anything; a new handshake starts over.
            logger.error("scheduler %d sent a malformed plan: %s", session.scheduler_pid, error)
        finally:
            if self._group is not None:
                self._group.leave()
            session.close()
        self._pending.clear()
        self._requests.reset()
        self._runner.reset()
        if self._adapters is not None:
            self._adapters.reset()

    def _join(self, rendezvous: str) -> None:
        assert self._group is not None
        self._group.join(rendezvous)
        if self._met is not None:
            self._met()

    def _execute_plans(self, session: WorkerSession) -> None:
        pending = self._pending
        while True:
            plan = None
            if len(pending) < MOST_LAUNCHED:
                plan = session.next_plan(block=not pending)
            if plan is not None:
                with self._termination.step():
                    pending.append(self._launch(plan))
            self._send_finished(session)
            if plan is None and pending:
                time.sleep(POLL_SECONDS)

    def _launch(self, plan: StepPlan) -> PendingStep:
        if plan.work_ahead:
            self._more_ahead = self._runner.work_ahead()
            return FinishedStep(StepResult(plan.step_id, u32([]), more_ahead=self._more_ahead))
        if plan.adapter_command is not None:
            return FinishedStep(self._adapt(plan.step_id, plan.adapter_command))
        if self._profiler is not None:
            self._profiler.before_step()
        self._requests.planned(plan)
        return self._runner.launch(plan)

    def _adapt(self, step_id: int, command: AdapterCommand) -> StepResult:
        if self._adapters is None:
            return StepResult(step_id, u32([]), error="this engine serves no adapters; see enable_lora")
        progress = self._adapters.execute(command)
        return StepResult(step_id, u32([]), error=progress.error, more_ahead=progress.more)

    def _send_finished(self, session: WorkerSession) -> None:
        pending = self._pending
        while pending and pending[0].done():
            result = pending.popleft().result()
            if self._group is not None and self._group.has_given_up:
                raise DeviceLost("a wait for another rank went on for minutes, and was given up")
            self._requests.finished(result)
            session.send_result(result if self._reports else _completion(result))
            if result.is_last:
                raise DeviceLost(result.error)


def _completion(result: StepResult) -> StepResult:
    """What a rank says of a step whose tokens another one reports."""
    return StepResult(
        result.step_id,
        u32([]),
        execute_us=result.execute_us,
        error=result.error,
        is_last=result.is_last,
        launch_us=result.launch_us,
        more_ahead=result.more_ahead,
    )
