"""When a request would get its first token, from what was measured of those before it.

Two things can make it wait: prompts ahead of it, at the rate at which steps take them, and requests ahead of
it, at the rate at which rows are left. There is no clock here: time passes as steps take it. What was not
measured yet makes nobody wait.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from engine.dispatch.limits import EngineLimits
from pagewire.base.errors import Overloaded
from scheduler.blocks.prefixes import Prefixes
from scheduler.policy.shares import Shares
from scheduler.policy.step_time import StepTimes, StepWork
from scheduler.policy.waiting import WaitingQueue
from scheduler.request import Request

_DEPARTURES = 256
"""How many of the requests that left a row last say how often one does."""

_FEWEST_DEPARTURES = 4
_LONGEST_RETRY = 60.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far what runs is.

    Attributes:
        decodes: those of the last step planned.
        num_prompt_tokens: of running requests, not planned yet.
        is_held_up: whether rows or blocks, and not the time for prompts, are what waiting requests lack.
    """

    decodes: StepWork
    num_prompt_tokens: int
    is_held_up: bool


class Forecast:
    """What is known of how fast requests are served. Queue, shares and prefixes are the scheduler's."""

    def __init__(
        self,
        limits: EngineLimits,
        target_itl: float | None,
        times: StepTimes,
        waiting: WaitingQueue,
        shares: Shares,
        prefixes: Prefixes,
    ) -> None:
        self._limits = limits
        self._target_itl = target_itl
        self._times = times
        self._waiting = waiting
        self._shares = shares
        self._prefixes = prefixes
        self._now = 0.0
        self._departures: deque[float] = deque(maxlen=_DEPARTURES)

    def ran(self, seconds: float) -> None:
        """A step took so long."""
        self._now += seconds

    def row_left(self) -> None:
        """A request gave up its row for good."""
        self._departures.append(self._now)

    def check(self, request: Request, timeout: float, progress: Progress) -> None:
        """Refuses a new request that those ahead of it make miss its time.

        Args:
            request: what is to begin to wait.
            timeout: seconds that it has.
            progress: how far what runs is.

        Raises:
            Overloaded: its first token is not likely to come in time.
        """
        waits = self._seconds_until_its_turn(request, progress)
        if waits <= 0:
            return
        num_cached = len(self._prefixes.find(request)) * self._limits.block_size
        num_tokens = len(request.token_ids) - num_cached
        needs = waits + self._seconds_for_prompts(num_tokens, progress.decodes)
        if needs > timeout:
            raise Overloaded(
                f"its first token would come in about {needs:.1f} s, but its deadline is in {timeout:.1f} s; "
                f"{self._waiting.num_waiting} requests are waiting: try again later",
                retry_after=_bounded(needs - timeout),
            )

    def retry_after(self, request: Request, progress: Progress) -> float:
        """Seconds after which a request that found no place in the queue had better come again: when half of
        those ahead of it will have been served.
        """
        return _bounded(self._seconds_until_its_turn(request, progress) / 2)

    def _seconds_until_its_turn(self, request: Request, progress: Progress) -> float:
        """How long a new request is likely to wait until anything of it is computed."""
        num_ahead, num_tokens = self._waiting.ahead_of(request)
        num_tokens += progress.num_prompt_tokens
        if not num_ahead and not num_tokens:
            return 0.0
        for_prompts = self._seconds_for_prompts(num_tokens, progress.decodes)
        share = self._shares.of(request.client)
        gets_a_row = self._shares.most_running(share) is not None and not self._waiting.has(share)
        if gets_a_row or not progress.is_held_up:
            return for_prompts
        return max(for_prompts, self._seconds_for_rows(num_ahead + 1))

    def _seconds_for_rows(self, num_requests: int) -> float:
        """How long it takes for so many requests to leave their rows."""
        if num_requests <= 0 or not self._departures:
            return 0.0
        # Those that left together with the first say nothing of how long one takes.
        first = self._departures[0]
        num_since = sum(left > first for left in self._departures)
        return num_requests * (self._now - first) / num_since if num_since >= _FEWEST_DEPARTURES else 0.0

    def _seconds_for_prompts(self, num_tokens: float, decodes: StepWork) -> float:
        """How long it takes to compute so many prompt tokens, in steps with these decodes."""
        alone = self._times.predict(decodes)
        per_token, _ = self._times.per_prompt_token()
        a_step = max(self._limits.max_num_batched_tokens - decodes.num_decodes, 1)
        target = self._target_itl
        if target is not None and decodes.num_decodes and per_token > 0:
            in_time = int((target - alone) / self._times.margin / per_token)
            a_step = max(min(a_step, in_time), self._limits.block_size)
        return num_tokens * (alone / a_step + per_token)


def _bounded(seconds: float) -> float:
    """At least a second, at most a minute."""
    return min(max(seconds, 1.0), _LONGEST_RETRY)
