"""Notices a worker that hangs, has it say where, and kills it; the rest is as for a worker that died.

A worker that dies closes its control socket. One that hangs (a kernel that never ends, a deadlock, a process
that was stopped) does nothing at all, so that only time can tell. There is one timer, which looks at when the
oldest step in flight began and sets itself anew; a step costs no timer, and an idle system has none.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable

from engine.dispatch.control import NUM_FIRST_STEPS, WorkerLink

logger = logging.getLogger(__name__)

FIRST_STEPS_FACTOR = 5
# From the request for its stacks to its end: the time that a worker has to write them.
STACKS_SECONDS = 1.0
# A timer that is late by this much shows that this process was stopped, and the worker probably with it.
_LATE_SECONDS = 5.0


class Watchdog:
    """Watches the steps of one attachment to a worker. Lives on the event loop.

    Args:
        link: to the worker.
        step_timeout: seconds that a step may take, once it is the oldest in flight; FIRST_STEPS_FACTOR times
            as long for the first NUM_FIRST_STEPS of a worker that is not warm.
        is_warm: whether the worker has computed so many for another scheduler.
        describe: what the worker has to do, for people.
        leave: called with the reason when the worker is killed, or hangs and may not be.
    """

    def __init__(
        self,
        link: WorkerLink,
        step_timeout: float,
        is_warm: bool,
        describe: Callable[[], str],
        leave: Callable[[str], None],
    ) -> None:
        self._link = link
        self._step_timeout = step_timeout
        self._describe = describe
        self._leave = leave
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._num_finished = NUM_FIRST_STEPS if is_warm else 0
        self._began: float | None = None

    def began(self) -> None:
        """There is a step in flight."""
        if self._began is None:
            self._began = self._loop.time()
            if self._timer is None:
                self._set_timer(self._began)

    def finished(self, num_steps: int, num_in_flight: int) -> None:
        """Results have come, and so many steps are left."""
        self._num_finished += num_steps
        self._began = self._loop.time() if num_in_flight else None

    def close(self) -> None:
        """The worker is left."""
        if self._timer is not None:
            self._timer.cancel()

    @property
    def limit(self) -> float:
        """Seconds that the oldest step in flight may take."""
        is_first = self._num_finished < NUM_FIRST_STEPS
        return self._step_timeout * (FIRST_STEPS_FACTOR if is_first else 1)

    def _set_timer(self, began: float) -> None:
        due = began + self.limit
        self._timer = self._loop.call_at(due, self._look, due)

    def _look(self, due: float) -> None:
        self._timer = None
        if self._began is None:
            return  # idle; the next step sets the timer
        now = self._loop.time()
        if now - due > _LATE_SECONDS:
            self._began = now
        if now - self._began < self.limit:
            self._set_timer(self._began)
        else:
            self._hangs(now - self._began)

    def _hangs(self, seconds: float) -> None:
        facts, process = self._link.facts, self._link.process
        who = f"worker rank {facts.rank} (pid {process.pid or self._link.worker_pid}, {facts.device})"
        cause = f"the engine-worker hung: {self._describe()} took more than {seconds:.1f} s"
        logger.error("%s hangs: %s has taken %.1f s", who, self._describe(), seconds)
        try:
            process.signal(signal.SIGUSR1)
        except OSError as error:
            logger.error("%s cannot be killed from here (%s), and is left; end it by hand", who, error)
            self._leave(cause)
            return
        logger.error("%s was asked for the stacks of its threads, which it writes to its log", who)
        self._timer = self._loop.call_later(STACKS_SECONDS, self._kill, who, cause, self._num_finished)

    def _kill(self, who: str, cause: str, num_finished: int) -> None:
        self._timer = None
        if self._num_finished > num_finished:
            logger.warning("%s goes on after all", who)
            if self._began is not None:
                self._set_timer(self._began)
            return
        logger.error("%s is killed", who)
        try:
            self._link.process.signal(signal.SIGKILL)
        except ProcessLookupError:
            logger.info("%s has ended by itself", who)
        self._leave(cause)
