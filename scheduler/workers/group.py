"""The workers of one attachment, treated as one: a step is over when every rank has completed it.

The first rank of the last pipeline stage reports results; the others report only that they completed a step
or failed. If any rank fails a step, the step has failed. If only some ranks fail, the others may wait forever
for data from them, so the scheduler detaches from the whole group; the workers keep their weights and can be
attached again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from engine.dispatch.link import Rank, WorkerLink
from engine.dispatch.records import StepResult

# After one rank fails a step, how long the other ranks may take to complete or fail it too.
FAILURE_SECONDS = 2.0


class GroupResults:
    """The results of all ranks, as one a step. Does not own the link.

    Attributes:
        num_complete: steps that every rank has completed or failed.
        execute_us: microseconds that each rank spent on the step polled last; empty for a group of one, whose
            result says it.
    """

    def __init__(self, link: WorkerLink) -> None:
        self._link = link
        self._reporter = link.facts.reporting_rank
        # Each rank's results of steps that other ranks have not completed yet.
        self._completed: list[deque[StepResult]] = [deque() for _ in link.ranks]
        self.num_complete = 0
        self.execute_us: list[int] = []

    def poll(self) -> StepResult | None:
        """The result of the next step if every rank has completed it, or if one rank reports its last
        result; else None.

        Raises:
            RecordError, RingError: a worker wrote something malformed.
            ValueError: ranks report different steps.
        """
        for number, completed in enumerate(self._completed):
            while (result := self._link.poll_result(number)) is not None:
                if result.error:
                    result.error = f"rank {number}: {result.error}"
                if result.is_last:
                    return result
                completed.append(result)
        if not all(self._completed):
            return None
        self.num_complete += 1
        results = [completed.popleft() for completed in self._completed]
        self.execute_us = [result.execute_us for result in results]
        return _merge(results, self._reporter)

    def wait(self, timeout: float | None = None) -> StepResult | None:
        """As `poll`, after waiting up to `timeout` seconds (None: for ever) for any rank to signal.

        Raises:
            WorkerGone: a worker is gone, and none has signalled.
        """
        result = self.poll()
        if result is not None:
            return result
        self._link.wait(timeout)
        return self.poll()

    @property
    def failure(self) -> str:
        """The error of a step that some ranks have failed and others have not finished; "" if none has."""
        errors = [completed[0].error for completed in self._completed if completed and completed[0].error]
        return errors[0] if errors else ""

    def late_ranks(self) -> list[Rank]:
        """The ranks that have not completed the oldest step in flight."""
        pairs = zip(self._link.ranks, self._completed, strict=True)
        return [rank for rank, completed in pairs if not completed]


class WorkerGroup:
    """The ranks that one scheduler drives. Used on the event loop only.

    Args:
        link: the link to all ranks; the group owns it from now on.
        leave: called with the reason when the scheduler must detach from the group.

    Attributes:
        facts: the group's facts; see WorkerLink.
        ranks: the worker processes.
        send_plan: publishes a plan to all ranks.
        clear: clears the eventfds of all ranks; read all results afterwards.
        poll_result: the result of the next step; see GroupResults.poll.
    """

    def __init__(self, link: WorkerLink, leave: Callable[[str], None]) -> None:
        self._link = link
        self._leave = leave
        self.facts, self.ranks = link.facts, link.ranks
        self.send_plan, self.clear = link.send_plan, link.clear
        self._is_alone = len(link.ranks) == 1
        self._results = GroupResults(link)
        self.poll_result: Callable[[], StepResult | None] = link.poll_result
        if not self._is_alone:
            self.poll_result = self._poll_all
        self._timer: asyncio.TimerHandle | None = None

    @property
    def execute_us(self) -> list[int]:
        """See GroupResults."""
        return self._results.execute_us

    def _poll_all(self) -> StepResult | None:
        result = self._results.poll()
        if result is None:
            self._watch_failure()
        return result

    def _watch_failure(self) -> None:
        """Starts a timer that gives the group up if some ranks failed a step and others do not finish it."""
        failure = self._results.failure
        if failure and self._timer is None:
            loop = asyncio.get_running_loop()
            num_complete = self._results.num_complete
            self._timer = loop.call_later(FAILURE_SECONDS, self._give_up, failure, num_complete)

    def _give_up(self, error: str, num_complete: int) -> None:
        self._timer = None
        if self._results.num_complete == num_complete:
            self._leave(f"a step failed on some ranks only: {error}")
        else:
            self._watch_failure()

    def late_ranks(self) -> list[Rank]:
        """The ranks that have not completed the oldest step in flight."""
        return self._results.late_ranks()

    def name_of(self, rank: Rank) -> str:
        """A rank's readable name, for logs and errors."""
        return "the engine-worker" if self._is_alone else f"the engine-worker of {rank}"

    def close(self) -> None:
        """Closes the link to the workers."""
        if self._timer is not None:
            self._timer.cancel()
        self._link.close()


def _merge(results: list[StepResult], reporter: int) -> StepResult:
    """The result of the rank that reports, with the errors, times and `more_ahead` of all ranks.

    Raises:
        ValueError: the ranks report different steps.
    """
    merged = results[reporter]
    for other in results:
        if other.step_id != merged.step_id:
            raise ValueError(f"ranks report steps {merged.step_id} and {other.step_id} at the same time")
        merged.error = merged.error or other.error
        merged.execute_us = max(merged.execute_us, other.execute_us)
        merged.launch_us = max(merged.launch_us, other.launch_us)
        merged.more_ahead |= other.more_ahead
    return merged
