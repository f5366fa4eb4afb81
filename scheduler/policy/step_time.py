"""How long a step will take, learned from those that ran, and how much of a prompt may join it.

A step's time is taken to be linear in what it computes: a constant, its decodes, the tokens they attend to,
its prompt tokens, and the tokens that those attend to. The last steps of either kind, with prompts and
without, are fitted by least squares on relative errors, so that a step during a pause, or one that compiled
kernels, weighs next to nothing, and whatever it did is forgotten when it leaves the window. There is no
clock here: times come in with results.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

_WINDOW = 64
"""Steps of either kind that are remembered."""

_REFIT_AFTER = 8
"""Steps with prompts between two fits, once the window is full."""

_MAX_GROWTH = 2
"""A step gets at most so many times the prompt tokens of the largest that is remembered."""

_MARGIN_PERCENTILE = 90
_MAX_MARGIN = 2.0
_ROUNDS = 4
_TOLERANCE = 0.1
"""Relative errors beyond it weigh less: Huber's loss, by reweighting (Holland and Welsch, 1977)."""


@dataclass(slots=True)
class StepWork:
    """What a step computes.

    Attributes:
        num_decodes: requests that compute one token.
        decode_context: tokens before those, in all.
        num_prompt: tokens of requests that compute several.
        prompt_context: for all of those, the tokens before them.
    """

    num_decodes: int = 0
    decode_context: int = 0
    num_prompt: int = 0
    prompt_context: int = 0

    def add(self, start: int, count: int) -> None:
        """One request computes `count` tokens from `start`."""
        if count == 1:
            self.num_decodes += 1
            self.decode_context += start
        else:
            self.num_prompt += count
            self.prompt_context += context_of(start, count)

    def without_prompts(self) -> StepWork:
        """Its decodes alone."""
        return StepWork(self.num_decodes, self.decode_context)

    def features(self) -> tuple[float, float, float, float, float]:
        """What the time is linear in."""
        return 1.0, self.num_decodes, self.decode_context, self.num_prompt, self.prompt_context


def context_of(start: int, count: int) -> int:
    """For `count` tokens from `start`, how many are before each, in all."""
    return count * start + count * (count - 1) // 2


class StepTimes:
    """Remembers what the last steps computed and how long they took."""

    def __init__(self) -> None:
        self._plain: deque[tuple[StepWork, float]] = deque(maxlen=_WINDOW)
        self._mixed: deque[tuple[StepWork, float]] = deque(maxlen=_WINDOW)
        self._num_unfitted = 0
        self._seconds_per: FloatArray = np.zeros(5)
        self._margin = 1.0

    def observe(self, work: StepWork, seconds: float) -> None:
        """A step took so long. Workers that do not tell say 0."""
        if seconds <= 0:
            return
        steps = self._mixed if work.num_prompt else self._plain
        steps.append((work, seconds))
        # Steps without prompts say nothing new for long, and come in thousands.
        self._num_unfitted += 1 if work.num_prompt or len(self._plain) < _WINDOW else 0

    @property
    def margin(self) -> float:
        """How many times its prediction all but the worst steps with prompts take."""
        self._fit_if_due()
        return self._margin

    @property
    def largest_prompt(self) -> int:
        """The most prompt tokens of a step that is remembered."""
        return max((work.num_prompt for work, _ in self._mixed), default=0)

    def predict(self, work: StepWork) -> float:
        """Seconds that a step is likely to take; 0 if none has run."""
        self._fit_if_due()
        return float(self._seconds_per @ work.features())

    def per_prompt_token(self) -> tuple[float, float]:
        """Seconds for each prompt token, and for each token that one attends to."""
        self._fit_if_due()
        return float(self._seconds_per[3]), float(self._seconds_per[4])

    def _fit_if_due(self) -> None:
        num_steps = len(self._plain) + len(self._mixed)
        if self._num_unfitted >= (_REFIT_AFTER if num_steps >= _WINDOW else 1):
            self._fit()

    def _fit(self) -> None:
        self._num_unfitted = 0
        steps = [*self._plain, *self._mixed]
        features = np.array([work.features() for work, _ in steps])
        seconds = np.array([taken for _, taken in steps])
        self._seconds_per = _fit(features, seconds)
        if self._mixed:
            ratios = (seconds / np.maximum(features @ self._seconds_per, 1e-9))[len(self._plain) :]
            self._margin = min(max(float(np.percentile(ratios, _MARGIN_PERCENTILE)), 1.0), _MAX_MARGIN)


def _fit(features: FloatArray, seconds: FloatArray) -> FloatArray:
    """Coefficients, none negative, that make relative errors small.

    Args:
        features: [steps, 5].
        seconds: [steps], each more than 0.
    """
    relative = features / seconds[:, None]
    scale = np.abs(relative).max(axis=0)
    scale[scale == 0] = 1.0
    relative /= scale
    weights = np.ones(len(seconds))
    found: FloatArray = np.zeros(features.shape[1])
    for _ in range(_ROUNDS):
        found = _non_negative(relative * weights[:, None], weights)
        errors = np.abs(relative @ found - 1.0)
        weights = np.sqrt(np.minimum(1.0, _TOLERANCE / np.maximum(errors, 1e-9)))
    scaled: FloatArray = found / scale
    return scaled


def _non_negative(rows: FloatArray, wanted: FloatArray) -> FloatArray:
    """Least squares without the features whose coefficients would be negative, worst first."""
    kept = np.arange(rows.shape[1])
    found: FloatArray = np.zeros(rows.shape[1])
    while len(kept):
        solution = np.linalg.lstsq(rows[:, kept], wanted, rcond=1e-9)[0]
        if solution.min() >= 0:
            found[kept] = solution
            break
        kept = np.delete(kept, solution.argmin())
    return found


class PromptTime:
    """What is left of a step's time for prompts. One step's, asked chunk by chunk.

    A step gets at least `smallest` prompt tokens, so that no prompt waits for ever behind decodes that take
    all the time there is.

    Attributes:
        is_short: whether a chunk has been cut, or left out.
    """

    def __init__(self, times: StepTimes, work: StepWork, target: float, smallest: int) -> None:
        """Args:
        times: what steps take.
        work: what the step computes besides.
        target: seconds that it may take.
        smallest: tokens that chunks are multiples of, where time cuts them.
        """
        # What makes decodes slow, such as a busy machine, is not made better by keeping prompts out.
        self._seconds = (target - times.predict(work)) / times.margin
        self._per_token, self._per_context = times.per_prompt_token()
        self._tokens = max(times.largest_prompt * _MAX_GROWTH, 4 * smallest)
        self._smallest = smallest
        self._is_first = True
        self.is_short = False

    def fit(self, start: int, count: int) -> int:
        """How many of `count` tokens of a prompt, from `start`, there is time for."""
        smallest = self._smallest
        most = min(self._tokens, self._tokens_in(start, self._seconds))
        if count <= most:
            return count
        self.is_short = True
        most -= most % smallest
        return min(count, max(most, smallest)) if self._is_first else most

    def _tokens_in(self, start: int, seconds: float) -> int:
        """The most tokens from `start` that take no longer: a root of what `spend` takes off."""
        if seconds <= 0:
            return 0
        slope, curve = self._per_token + self._per_context * start, self._per_context / 2
        if curve > 0:
            return int(2 * seconds / (slope + np.sqrt(slope * slope + 4 * curve * seconds)))
        return int(min(seconds / slope, self._tokens)) if slope > 0 else self._tokens

    def spend(self, start: int, count: int) -> None:
        """Such a chunk is in the step."""
        self._is_first = False
        self._tokens -= count
        self._seconds -= self._per_token * count + self._per_context * context_of(start, count)
