"""How many draft tokens each decoding request gets in a step: as many as pay for the time they take.

A step that verifies drafts computes a slot for each request and one more for each draft. A request whose
drafts are accepted with probability a gains a + a^2 + ... + a^d tokens by d drafts. Each further slot goes to
the request that gains the most by it, up to the number of slots at which the expected tokens per second are
the highest. Times by the number of slots are medians of measured steps; acceptance is counted for each
request, and begins with what all requests together have shown. So where a batch is large, or nothing is
accepted, nothing is proposed, and nothing is computed for it.

No clock is read: times come with results.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.dispatch.limits import EngineLimits

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

# What is assumed of a request before anything is known, and at least of each new one.
_FIRST_ACCEPTANCE = 0.7
_LEAST_FIRST_ACCEPTANCE = 0.3
# How many drafts this assumption counts for.
_PRIOR_DRAFTS = 3.0
# What earlier drafts count for after a step with drafts, and after one without: so that what was not tried
# for long is tried again.
_MEMORY, _IDLE_MEMORY = 0.85, 0.99
# The same for all requests together, by step.
_COMMON_MEMORY = 0.98
_SAMPLES = 5
# A time that was measured so many steps ago is measured again.
_STALE_AFTER = 2048
_ASK_AGAIN_AFTER = 64
# Steps after which measured times are looked at again.
_TABLE_STEPS = 16
# Up to so many slots a step mostly reads weights: its time is assumed to be that of fewer slots until it is
# measured. With more, it is assumed to grow almost like their number.
_FLAT_SLOTS = 64
_GROWTH = 0.8
# Drafts must promise this much more tokens per second than none.
_LEAST_GAIN = 1.01


@dataclass(slots=True)
class _Times:
    """The last times of steps with about so many slots, in seconds, and the step of the last one."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_SAMPLES))
    median: float = 0.0
    last_step: int = 0


class Drafting:
    """Owned by the scheduler, which tells it what steps gained.

    Attributes:
        max_drafts: of a request in a step; 0 without speculation.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self.max_drafts = limits.max_drafts
        self._max_in_step = limits.max_draft_tokens
        num_rows = limits.max_num_seqs
        self._arrivals = np.full(num_rows, -1, np.int64)
        self._accepted, self._tried = np.zeros((2, num_rows))
        self._first: FloatArray = np.full(num_rows, _FIRST_ACCEPTANCE)
        self._common_accepted = self._common_tried = 0.0
        self._times: dict[int, _Times] = {}
        self._plain_asked: dict[int, int] = {}
        self._num_steps = 0
        most = num_rows + limits.max_draft_tokens
        self._places: IntArray = np.array([_place_of(count) for count in range(most + 1)], np.int64)
        self._seconds: FloatArray = np.ones(len(self._places))
        self._table_is_due = 0

    def choose(self, rows: IntArray, arrivals: IntArray, most: IntArray, budget: int) -> IntArray | None:
        """The number of drafts for each of the rows that decode; None if there are none.

        Args:
            rows, arrivals: of the decoding requests, [S].
            most: drafts that each may have, [S].
            budget: drafts that all may have together.
        """
        self._num_steps += 1
        budget = min(budget, self._max_in_step)
        if not len(rows) or budget <= 0:
            return None
        self._enter(rows, arrivals)
        if self._must_measure_plain(len(rows)):
            return None
        acceptance = self._acceptance(rows)
        chosen = self._best(acceptance, np.minimum(most, self.max_drafts), budget)
        idle = rows if chosen is None else rows[chosen == 0]
        self._accepted[idle] *= _IDLE_MEMORY
        self._tried[idle] *= _IDLE_MEMORY
        return chosen

    def _must_measure_plain(self, num_requests: int) -> bool:
        """Whether a step without drafts has not been measured for long: drafts are compared with it."""
        place = int(self._places[num_requests])
        times, asked = self._times.get(place), self._plain_asked.get(place)
        if times is not None and self._num_steps - times.last_step < _STALE_AFTER:
            return False
        if asked is not None and self._num_steps - asked < _ASK_AGAIN_AFTER:
            return False  # the answer is on its way, or the worker does not measure
        self._plain_asked[place] = self._num_steps
        return True

    def _enter(self, rows: IntArray, arrivals: IntArray) -> None:
        """Forgets what rows have shown for the requests that held them before."""
        new = rows[self._arrivals[rows] != arrivals]
        if len(new):
            self._arrivals[rows] = arrivals
            self._accepted[new] = self._tried[new] = 0.0
            common = _FIRST_ACCEPTANCE
            if self._common_tried:
                weight = self._common_tried + _PRIOR_DRAFTS
                common = (self._common_accepted + _PRIOR_DRAFTS * _FIRST_ACCEPTANCE) / weight
            self._first[new] = max(common, _LEAST_FIRST_ACCEPTANCE)

    def _acceptance(self, rows: IntArray) -> FloatArray:
        """The probability that a request's next draft is accepted, if all before it are."""
        accepted = self._accepted[rows] + _PRIOR_DRAFTS * self._first[rows]
        found: FloatArray = accepted / (self._tried[rows] + _PRIOR_DRAFTS)
        return found

    def _best(self, acceptance: FloatArray, most: IntArray, budget: int) -> IntArray | None:
        num_requests, depth = len(acceptance), np.arange(1, self.max_drafts + 1)
        # [S, max_drafts]; a request's gains fall from draft to draft, so that the best slots are its first.
        gains = np.where(depth <= most[:, None], acceptance[:, None] ** depth, 0.0).ravel()
        num_slots = min(budget, int(np.count_nonzero(gains)))
        if num_slots == 0:
            return None
        order = np.argsort(-gains, kind="stable")[:num_slots]
        tokens = num_requests + np.cumsum(gains[order])
        seconds = self._table()
        rates = tokens / seconds[num_requests + 1 : num_requests + 1 + num_slots]
        best = int(rates.argmax())
        if rates[best] < _LEAST_GAIN * num_requests / seconds[num_requests]:
            return None
        chosen: IntArray = np.bincount(order[: best + 1] // self.max_drafts, minlength=num_requests)
        return chosen

    def _table(self) -> FloatArray:
        """What steps take by their number of slots, [slots + 1]."""
        if self._num_steps >= self._table_is_due:
            self._table_is_due = self._num_steps + _TABLE_STEPS
            by_place = np.array([self._seconds_at(place) for place in range(int(self._places[-1]) + 1)])
            self._seconds = by_place[self._places]
        return self._seconds

    def _seconds_at(self, place: int) -> float:
        """What a step of so many slots takes; 1 where nothing is known of any."""
        times = self._times.get(place)
        if times is not None and self._num_steps - times.last_step < _STALE_AFTER:
            return times.median
        below = max((each for each in self._times if each < place), default=None)
        if below is None:
            above = min((each for each in self._times if each > place), default=None)
            return 1.0 if above is None else self._times[above].median
        base = max(_slots_at(below), _FLAT_SLOTS)
        growth: float = max(_slots_at(place) / base, 1.0) ** _GROWTH
        return self._times[below].median * growth

    def observe(self, num_slots: int, seconds: float) -> None:
        """Records what a step of so many slots, and no prompt, took. A worker that does not measure it
        reports 0, which is ignored.
        """
        if seconds <= 0 or not self.max_drafts:
            return
        place = int(self._places[num_slots])
        times = self._times.get(place)
        if times is None:
            times = self._times[place] = _Times()
            self._table_is_due = 0
        times.seconds.append(seconds)
        ordered = sorted(times.seconds)
        times.median = ordered[(len(ordered) - 1) // 2]
        times.last_step = self._num_steps

    def gained(self, rows: IntArray, planned: IntArray, num_tokens: IntArray) -> None:
        """Records what requests gained by their drafts. Slots for which nothing was proposed count as not
        accepted: they took as long.

        Args:
            rows: that still hold the same requests, [S].
            planned: the drafts that each could have, [S].
            num_tokens: what each gained, the token that it gains without drafts included, [S].
        """
        drafted = planned > 0
        rows, planned = rows[drafted], planned[drafted]
        accepted = np.maximum(num_tokens[drafted] - 1, 0)
        tried = accepted + (accepted < planned)
        self._accepted[rows] = self._accepted[rows] * _MEMORY + accepted
        self._tried[rows] = self._tried[rows] * _MEMORY + tried
        self._common_accepted = self._common_accepted * _COMMON_MEMORY + float(accepted.sum())
        self._common_tried = self._common_tried * _COMMON_MEMORY + float(tried.sum())


# Numbers of slots that count as one: all up to 16, then eight for each doubling.
_PLACES_PER_DOUBLING = 8
_EXACT = 16


def _place_of(num_slots: int) -> int:
    if num_slots <= _EXACT:
        return num_slots
    return _EXACT + int(np.ceil(_PLACES_PER_DOUBLING * np.log2(num_slots / _EXACT)))


def _slots_at(place: int) -> float:
    """The most slots at a place."""
    if place <= _EXACT:
        return float(place)
    return float(_EXACT * 2 ** ((place - _EXACT) / _PLACES_PER_DOUBLING))
