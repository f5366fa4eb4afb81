"""The engine-worker process: loads a model once, then serves one scheduler after another."""

from __future__ import annotations

import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from engine.config import WorkerConfig
from engine.dispatch.control import SchedulerGone, WorkerEndpoint, WorkerSession
from engine.dispatch.sampling import RecordError
from engine.step.runner import DeviceLost, LoadedWorker, PendingStep, Runner
from engine.worker.timeline import Timeline
from pagewire.base.errors import ConfigError
from pagewire.base.exit_status import DEVICE_LOST
from pagewire.base.gc_freeze import spare_what_is_loaded
from pagewire.base.notify import notify_ready

if TYPE_CHECKING:
    from engine.worker.profiling import StepProfiler

logger = logging.getLogger(__name__)

# Between two looks at a device that is computing while no plan is there.
POLL_SECONDS = 20e-6
# Between two pieces of work for later, while steps follow each other without a pause: half a percent of it.
WORK_AHEAD_SECONDS = 5.0


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
        try:
            endpoint = WorkerEndpoint(config.socket)
        except OSError as error:
            raise ConfigError(f"cannot listen on {config.socket}: {error}") from error
        try:
            spare_what_is_loaded()
            notify_ready(f"{worker.facts.model} on {worker.facts.device}")
            logger.info("listening on %s", config.socket)
            logger.info("%s", timeline)
            while True:
                session = endpoint.accept(worker.facts)
                logger.info("serving scheduler %d", session.scheduler_pid)
                _serve(session, worker.runner, termination, profiler)
        finally:
            endpoint.close()
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


def _serve(
    session: WorkerSession, runner: Runner, termination: _Termination, profiler: StepProfiler | None
) -> None:
    """Executes one scheduler's plans until it goes; then forgets its requests and keeps the weights."""
    pending: deque[PendingStep] = deque()
    more_ahead, next_ahead = True, 0.0
    try:
        while True:
            plan = session.next_plan(block=not pending and not more_ahead)
            if plan is not None:
                with termination.step():
                    if profiler is not None:
                        profiler.before_step()
                    pending.append(runner.launch(plan))
            _send_finished(session, pending)
            if plan is None and more_ahead and (not pending or time.monotonic() >= next_ahead):
                session.check()
                with termination.step():
                    more_ahead = runner.work_ahead()
                next_ahead = time.monotonic() + WORK_AHEAD_SECONDS
            elif plan is None and pending:
                time.sleep(POLL_SECONDS)
    except SchedulerGone:
        logger.info("scheduler %d is gone", session.scheduler_pid)
    except RecordError as error:
        # The two sides no longer agree on anything; a new handshake starts over.
        logger.error("scheduler %d sent a malformed plan: %s", session.scheduler_pid, error)
    finally:
        session.close()
    runner.reset()


def _send_finished(session: WorkerSession, pending: deque[PendingStep]) -> None:
    while pending and pending[0].done():
        result = pending.popleft().result()
        session.send_result(result)
        if result.is_last:
            raise DeviceLost(result.error)
