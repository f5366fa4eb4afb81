"""Predicts when a request would get its first token, from measurements of earlier requests.

Two things delay a request: the prompt tokens ahead of it, at the rate at which steps compute them, and the
requests ahead of it, at the rate at which rows become free. There is no clock here: time is the sum of the
execution times of steps. A rate that was not measured yet counts as no delay.
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
"""The number of latest departures from rows that give the rate at which rows become free."""

_FEWEST_DEPARTURES = 4
_LONGEST_RETRY = 60.0


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of the running requests.

    Attributes:
        decodes: the decodes of the last planned step.
        num_prompt_tokens: prompt tokens of running requests that are not planned yet.
        is_held_up: whether waiting requests lack rows or blocks, rather than token budget or time.
    """

    decodes: StepWork
    num_prompt_tokens: int
    is_held_up: bool


class Forecast:
    """Predicts waiting times. The scheduler owns queue, shares and prefixes."""

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
        """Records the execution time of a step."""
        self._now += seconds

    def row_left(self) -> None:
        """Records that a running request ended and freed its row."""
        self._departures.append(self._now)

    def check(self, request: Request, timeout: float, progress: Progress) -> None:
        """Refuses a new request if the requests ahead of it would make it miss its deadline.

        Args:
            request: the new request, not queued yet.
            timeout: its deadline, in seconds from now.
            progress: the state of the running requests.

        Raises:
            Overloaded: its first token is not expected before the deadline.
        """
        waits = self._seconds_until_its_turn(request, progress)
        if waits <= 0:
            return
        num_tokens = len(request.token_ids) - self._prefixes.num_found(request)
        needs = waits + self._seconds_for_prompts(num_tokens, progress.decodes)
        if needs > timeout:
            raise Overloaded(
                f"its first token would come in about {needs:.1f} s, but its deadline is in {timeout:.1f} s; "
                f"{self._waiting.num_waiting} requests are waiting: try again later",
                retry_after=_bounded(needs - timeout),
            )

    def retry_after(self, request: Request, progress: Progress) -> float:
        """Seconds after which a client should retry a request that the queue had no room for: when about
        half of the requests ahead of it will have been served.
        """
        return _bounded(self._seconds_until_its_turn(request, progress) / 2)

    def _seconds_until_its_turn(self, request: Request, progress: Progress) -> float:
        """Expected seconds until the first chunk of a new request is computed."""
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
        """Expected seconds until this many requests have freed their rows."""
        if num_requests <= 0 or not self._departures:
            return 0.0
        # Requests that left together with the first say nothing about the time between departures.
        first = self._departures[0]
        num_since = sum(left > first for left in self._departures)
        return num_requests * (self._now - first) / num_since if num_since >= _FEWEST_DEPARTURES else 0.0

    def _seconds_for_prompts(self, num_tokens: float, decodes: StepWork) -> float:
        """Expected seconds to compute this many prompt tokens, in steps that also do these decodes."""
        alone = self._times.predict(decodes)
        per_token, _ = self._times.per_prompt_token()
        a_step = max(self._limits.max_num_batched_tokens - decodes.num_decodes, 1)
        target = self._target_itl
        if target is not None and decodes.num_decodes and per_token > 0:
            in_time = int((target - alone) / self._times.margin / per_token)
            a_step = max(min(a_step, in_time), self._limits.block_size)
        return num_tokens * (alone / a_step + per_token)


def _bounded(seconds: float) -> float:
    """Limits seconds to between 1 and _LONGEST_RETRY."""
    return min(max(seconds, 1.0), _LONGEST_RETRY)
