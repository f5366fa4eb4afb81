"""Detects a worker that hangs, asks it for the stacks of its threads, and kills it. Then it is handled like a
worker that died.

A worker that dies closes its control socket. One that hangs (a kernel that never ends, a deadlock, a stopped
process) can only be detected by a timeout. There is one timer, which checks when the oldest step in flight
began and sets itself again; a step needs no timer of its own, and an idle system has none.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable

from engine.dispatch.control import NUM_FIRST_STEPS
from engine.dispatch.link import Rank
from scheduler.workers.group import WorkerGroup

logger = logging.getLogger(__name__)

FIRST_STEPS_FACTOR = 5
# The time that a worker has to write its stacks before it is killed.
STACKS_SECONDS = 1.0
# A timer that fires this late means that this process was stopped, and probably the worker too.
_LATE_SECONDS = 5.0


class Watchdog:
    """Watches the steps of one attachment. Used on the event loop only.

    Args:
        group: the workers.
        step_timeout: seconds that a step may take once it is the oldest in flight; FIRST_STEPS_FACTOR times
            as long for the first NUM_FIRST_STEPS of workers that are not warm.
        is_warm: whether the workers have already computed that many steps for another scheduler.
        describe: returns a readable description of the workers' current work.
        leave: called when a worker was killed, or hangs and cannot be killed, with the reason and whether
            it is still unknown which worker hangs.
    """

    def __init__(
        self,
        group: WorkerGroup,
        step_timeout: float,
        is_warm: bool,
        describe: Callable[[], str],
        leave: Callable[[str, bool], None],
    ) -> None:
        self._group = group
        self._step_timeout = step_timeout
        self._describe = describe
        self._leave = leave
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._num_finished = NUM_FIRST_STEPS if is_warm else 0
        self._began: float | None = None
        self._num_signs = 0

    def began(self) -> None:
        """Records that a step is in flight."""
        if self._began is None:
            self._began = self._loop.time()
            if self._timer is None:
                self._set_timer(self._began)

    def finished(self, num_steps: int, num_in_flight: int) -> None:
        """Records that results came, of `num_steps` steps and perhaps of work ahead, and what is left."""
        self._num_finished += num_steps
        self._num_signs += 1
        self._began = self._loop.time() if num_in_flight else None

    def close(self) -> None:
        """Stops the timer."""
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
        late = self._group.late_ranks()
        cause = f"the engine-worker hung: {self._describe()} took more than {seconds:.1f} s"
        for rank in late:
            logger.error("worker %s hangs: %s has taken %.1f s", rank, self._describe(), seconds)
        asked = [rank for rank in late if self._ask_for_stacks(rank)]
        if asked:
            self._timer = self._loop.call_later(STACKS_SECONDS, self._kill, asked, cause, self._num_signs)
        else:
            self._leave(cause, False)

    def _ask_for_stacks(self, rank: Rank) -> bool:
        """Asks a worker for the stacks of its threads. Returns False if it cannot be signalled."""
        try:
            rank.process.signal(signal.SIGUSR1)
        except OSError as error:
            logger.error(
                "worker %s cannot be killed from here (%s), and is left; end it by hand", rank, error
            )
            return False
        logger.error("worker %s was asked for the stacks of its threads, which it writes to its log", rank)
        return True

    def _kill(self, asked: list[Rank], cause: str, num_signs: int) -> None:
        self._timer = None
        if self._num_signs > num_signs:
            logger.warning("worker %s goes on after all", ", ".join(map(str, asked)))
            if self._began is not None:
                self._set_timer(self._began)
            return
        late = [rank for rank in asked if rank in self._group.late_ranks()]
        if len(late) > 1 or self._group.facts.num_stages > 1:
            # Only one of them hangs and the others wait for it. Once detached, the others answer again. Of a
            # pipeline the one that hangs need not be late: what it has sent may not have left it yet.
            logger.error("workers are left, %d of them late: the one that hangs will not answer", len(late))
            self._leave(cause, True)
            return
        for rank in late:
            logger.error("worker %s is killed", rank)
            try:
                rank.process.signal(signal.SIGKILL)
            except ProcessLookupError:
                logger.info("worker %s has ended by itself", rank)
        self._leave(cause, False)
