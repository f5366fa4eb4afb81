"""The engine of one program: a worker process of its own and the scheduler core in this process.

The same worker, dispatch and core as in the service; only the sockets to clients are missing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from engine.config import WorkerConfig
from engine.dispatch.control import (
    MAX_STEPS_IN_FLIGHT,
    NUM_FIRST_STEPS,
    WORK_AHEAD_STEP,
    WorkerGone,
    WorkerSilent,
)
from engine.dispatch.facts import WorkerFacts
from engine.dispatch.link import WorkerLink
from engine.dispatch.records import StepResult
from pagewire.base.command_line import arguments
from pagewire.base.errors import ConfigError, Unavailable
from pagewire.base.exit_status import CONFIG_ERROR
from pagewire.base.lifeline import Lifeline
from pagewire.base.own_packages import python_command
from pagewire.offline.idle_work import IdleWork
from scheduler.core import Scheduler
from scheduler.masks.maker import MaskMaker, MaskOutcome
from scheduler.request import EndReason, Request, Status
from scheduler.settings import CoreSettings
from scheduler.step import StepOutput
from scheduler.workers.pacing import Pacing
from scheduler.workers.watchdog import FIRST_STEPS_FACTOR, STACKS_SECONDS
from scheduler.workers.work_ahead import WorkAhead, work_ahead_plan

# Seconds that a step may take; as of a service.
STEP_TIMEOUT = 120.0
_LAST_BYTES = 4096
_RETRY_SECONDS = 0.02
_STOP_SECONDS = 10.0


class OfflineEngine:
    """Owns the worker process, the link to it and the core. Not for use from several threads.

    Attributes:
        facts: of the worker.
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
        self._directory = tempfile.TemporaryDirectory(prefix="pagewire-", ignore_cleanup_errors=True)
        socket = Path(self._directory.name) / "worker.sock"
        self._log: IO[bytes] = (Path(self._directory.name) / "worker.log").open("w+b")
        self._lifeline = Lifeline()
        self._link: WorkerLink | None = None
        self._process = self._start(worker, socket)
        try:
            link = self._connect(socket)
            self._attach(link, settings, step_timeout)
            self._idle.begin()
        except BaseException:
            self._stop()
            raise

    def _attach(self, link: WorkerLink, settings: CoreSettings, step_timeout: float = STEP_TIMEOUT) -> None:
        self._link = link
        self._step_timeout = step_timeout
        self._num_finished, self._began = 0, 0.0
        self._ahead = WorkAhead(link.facts.more_ahead)
        self._idle = IdleWork(link, self._ahead)
        self.facts: WorkerFacts = link.facts
        self.core = Scheduler(self.facts.limits, settings)
        self._mask_ready = threading.Event()
        self._pacing = Pacing()
        self._masks = MaskMaker(self.facts, self._mask_ready.set)

    def _start(self, worker: WorkerConfig, socket: Path) -> subprocess.Popen[bytes]:
        config = [*arguments(worker), "--socket", str(socket)]
        return subprocess.Popen(
            [*python_command("engine"), *config],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=_environment(self._lifeline),
            pass_fds=(self._lifeline.child_fd,),
            start_new_session=True,
        )

    def _connect(self, socket: Path) -> WorkerLink:
        while True:
            try:
                return WorkerLink.connect(socket)
            except WorkerSilent as error:
                error.process.close()
                raise self._hung("the handshake") from None
            except (FileNotFoundError, ConnectionRefusedError):
                if self._process.poll() is not None:
                    raise self._died() from None
            time.sleep(_RETRY_SECONDS)

    def _died(self) -> ConfigError | Unavailable:
        self._process.wait()
        log = self._last_log()
        if self._process.returncode == CONFIG_ERROR:
            return ConfigError(log.splitlines()[-1].removeprefix("engine-worker: "))
        return Unavailable(f"the engine-worker ended with status {self._process.returncode}:\n{log}")

    def _hung(self, what: str) -> Unavailable:
        """Ends the worker, after it has written the stacks of its threads."""
        self._process.send_signal(signal.SIGUSR1)
        time.sleep(STACKS_SECONDS)
        self._process.kill()
        self._process.wait()
        return Unavailable(
            f"the engine-worker hung and was killed: {what} did not end. Its log:\n{self._last_log()}"
        )

    @property
    def _limit(self) -> float:
        """Seconds that a step may take."""
        return self._step_timeout * (FIRST_STEPS_FACTOR if self._num_finished < NUM_FIRST_STEPS else 1)

    def _last_log(self) -> str:
        self._log.seek(0)
        return self._log.read()[-_LAST_BYTES:].decode(errors="replace").strip()

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
            raise self._hung("work ahead of steps")
        while True:
            if self._masks.num_under_way and (ended := self._take_masks()):
                yield StepOutput(ended=ended)
            while (
                self.core.num_in_flight < MAX_STEPS_IN_FLIGHT
                and not self._pacing.holds_back(self.core)
                and (plan := self.core.schedule()) is not None
            ):
                if self.core.num_in_flight == 1:
                    self._began = time.monotonic()
                self._link.send_plan(plan)
            self.core.take_admitted()  # which would be kept for ever; what was cached is told with the output
            self._plan_ahead()
            if self.core.num_in_flight:
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

    def _next_result(self) -> StepResult | None:
        """The result of the oldest step in flight; None if it is not there yet."""
        assert self._link is not None
        seconds = self._began + self._limit - time.monotonic()
        try:
            result = self._link.wait_result(max(0.0, seconds))
        except WorkerGone:
            raise self._died() from None
        now = time.monotonic()
        if result is None:
            if now >= self._began + self._limit:
                limit = f"after {now - self._began:.1f} s (step_timeout is {self._step_timeout:g})"
                raise self._hung(f"{self.core.describe_oldest()}, {limit},")
            return None
        self._began = now
        if result.step_id == WORK_AHEAD_STEP:
            self._ahead.finished(result.more_ahead)
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
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._link is not None:
            self._idle.end(_STOP_SECONDS)  # at once, as the worker has ended
            self._link.close()
            self._link = None
        self._lifeline.close()
        self._log.close()
        self._directory.cleanup()


def _environment(lifeline: Lifeline) -> dict[str, str]:

    return {**os.environ, "PYTHONUNBUFFERED": "1", **lifeline.environment()}
