"""The workers of one attachment, taken as one: a step is over when every rank has completed it.

The first rank reports results; the others report that they have completed a step, or failed. Any rank's
failure is the step's. Where only some fail, the others may wait for ever for what those do not send, so that
the whole group is given up; the workers keep their weights, and meet again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from engine.dispatch.link import Rank, WorkerLink
from engine.dispatch.records import StepResult

# From one rank's failure of a step: how long the others may take to complete or fail it too.
FAILURE_SECONDS = 2.0


class WorkerGroup:
    """The ranks that one scheduler drives. Lives on the event loop.

    Args:
        link: to all of them. It is taken over.
        leave: called with the reason when the group cannot go on.

    Attributes:
        facts: of the group; see WorkerLink.
        ranks: its processes.
        send_plan: publishes a plan to all of them.
        clear: takes the signals of all of them; read all results afterwards.
        poll_result: the result of the next step, if every rank has completed it, or one can complete nothing
            any more. Raises RecordError or RingError where a worker wrote something malformed, and ValueError
            where ranks report different steps.
    """

    def __init__(self, link: WorkerLink, leave: Callable[[str], None]) -> None:
        self._link = link
        self._leave = leave
        self.facts, self.ranks = link.facts, link.ranks
        self.send_plan, self.clear = link.send_plan, link.clear
        self._is_alone = len(link.ranks) == 1
        self.poll_result: Callable[[], StepResult | None] = link.poll_result
        if not self._is_alone:
            self.poll_result = self._poll_all
        # What each rank has said of steps that others have not completed yet.
        self._completed: list[deque[StepResult]] = [deque() for _ in link.ranks]
        self._num_complete = 0
        self._timer: asyncio.TimerHandle | None = None

    def _poll_all(self) -> StepResult | None:
        for number, completed in enumerate(self._completed):
            while (result := self._link.poll_result(number)) is not None:
                if result.error:
                    result.error = f"rank {number}: {result.error}"
                if result.is_last:
                    return result
                completed.append(result)
        if not all(self._completed):
            self._watch_failure()
            return None
        self._num_complete += 1
        return _merge([completed.popleft() for completed in self._completed])

    def _watch_failure(self) -> None:
        """Gives the group up if a step that some ranks have failed is not completed by the others soon."""
        errors = [completed[0].error for completed in self._completed if completed and completed[0].error]
        if errors and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(FAILURE_SECONDS, self._give_up, errors[0], self._num_complete)

    def _give_up(self, error: str, num_complete: int) -> None:
        self._timer = None
        if self._num_complete == num_complete:
            self._leave(f"a step failed on some ranks only: {error}")
        else:
            self._watch_failure()

    def late_ranks(self) -> list[Rank]:
        """Those that have not completed the oldest step in flight."""
        return [rank for rank, completed in zip(self.ranks, self._completed, strict=True) if not completed]

    def name_of(self, rank: Rank) -> str:
        """For people."""
        return "the engine-worker" if self._is_alone else f"the engine-worker of rank {rank.facts.rank}"

    def close(self) -> None:
        """Leaves the workers."""
        if self._timer is not None:
            self._timer.cancel()
        self._link.close()


def _merge(results: list[StepResult]) -> StepResult:
    """The first rank's result, with what the others say of the same step."""
    merged = results[0]
    for other in results[1:]:
        if other.step_id != merged.step_id:
            raise ValueError(f"ranks report steps {merged.step_id} and {other.step_id} at the same time")
        merged.error = merged.error or other.error
        merged.execute_us = max(merged.execute_us, other.execute_us)
        merged.launch_us = max(merged.launch_us, other.launch_us)
        merged.more_ahead |= other.more_ahead
    return merged
