"""Predicts how long a step takes, from earlier steps, and limits the prompt tokens in it accordingly.

The model is linear: a constant, the decodes, the context tokens of the decodes, the prompt tokens, and the
context tokens of those. It is fitted by least squares on relative errors to the last steps with prompts and
the last steps without. A robust loss gives outliers, such as a step during a pause or one that compiled
kernels, almost no weight until they leave the window. There is no clock here: times come with results.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

_WINDOW = 64
"""How many steps with prompts, and how many without, are remembered."""

_REFIT_AFTER = 8
"""Steps with prompts between two fits, once _WINDOW steps are remembered."""

_MAX_GROWTH = 2
"""A step gets at most this many times the prompt tokens of the largest remembered step."""

_MARGIN_PERCENTILE = 90
_MAX_MARGIN = 2.0
_ROUNDS = 4
_TOLERANCE = 0.1
"""Larger relative errors get less weight: Huber's loss, by reweighting (Holland and Welsch, 1977)."""


@dataclass(slots=True)
class StepWork:
    """The amount of work in a step.

    Attributes:
        num_decodes: requests that compute one token.
        decode_context: sum of the tokens before each of those.
        num_prompt: tokens of the requests that compute several.
        prompt_context: sum of the tokens before each of those.
    """

    num_decodes: int = 0
    decode_context: int = 0
    num_prompt: int = 0
    prompt_context: int = 0

    def add(self, start: int, count: int) -> None:
        """Adds one request that computes `count` tokens from `start`."""
        if count == 1:
            self.num_decodes += 1
            self.decode_context += start
        else:
            self.num_prompt += count
            self.prompt_context += context_of(start, count)

    def without_prompts(self) -> StepWork:
        """A copy with the decodes only."""
        return StepWork(self.num_decodes, self.decode_context)

    def features(self) -> tuple[float, float, float, float, float]:
        """The features of the linear model."""
        return 1.0, self.num_decodes, self.decode_context, self.num_prompt, self.prompt_context


def context_of(start: int, count: int) -> int:
    """The sum, over `count` tokens from `start`, of the tokens before each."""
    return count * start + count * (count - 1) // 2


class StepTimes:
    """Fits step time to the work and the measured times of the last steps."""

    def __init__(self) -> None:
        self._plain: deque[tuple[StepWork, float]] = deque(maxlen=_WINDOW)
        self._mixed: deque[tuple[StepWork, float]] = deque(maxlen=_WINDOW)
        self._num_unfitted = 0
        self._seconds_per: FloatArray = np.zeros(5)
        self._margin = 1.0

    def observe(self, work: StepWork, seconds: float) -> None:
        """Records the time of a step. Workers that do not measure it report 0, which is ignored."""
        if seconds <= 0:
            return
        steps = self._mixed if work.num_prompt else self._plain
        steps.append((work, seconds))
        # Steps without prompts come in thousands and hardly change the fit.
        self._num_unfitted += 1 if work.num_prompt or len(self._plain) < _WINDOW else 0

    @property
    def margin(self) -> float:
        """The 90th percentile of measured over predicted time of steps with prompts, between 1 and 2."""
        self._fit_if_due()
        return self._margin

    @property
    def largest_prompt(self) -> int:
        """The most prompt tokens of any remembered step."""
        return max((work.num_prompt for work, _ in self._mixed), default=0)

    def predict(self, work: StepWork) -> float:
        """Expected seconds for a step; 0 if none has run yet."""
        self._fit_if_due()
        return float(self._seconds_per @ work.features())

    def per_prompt_token(self) -> tuple[float, float]:
        """(seconds per prompt token, seconds per context token of a prompt token)."""
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
    """Non-negative coefficients that minimise a robust loss of the relative errors.

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
    """Least squares; drops features whose coefficients would be negative, the most negative first."""
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
    """The time left for prefill chunks in one step.

    A step gets at least `smallest` prompt tokens, so that no prompt waits forever when decodes alone take
    the whole time.

    Attributes:
        is_short: whether a chunk was cut or left out for time.
    """

    def __init__(self, times: StepTimes, work: StepWork, target: float, smallest: int) -> None:
        """Args:
        times: the fitted step times.
        work: what the step computes besides.
        target: seconds that the step may take.
        smallest: chunks that are cut for time are multiples of this many tokens.
        """
        # The margin is not applied to the decodes: if a busy machine slows those, fewer prompt tokens do not
        # help.
        self._seconds = (target - times.predict(work)) / times.margin
        self._per_token, self._per_context = times.per_prompt_token()
        self._tokens = max(times.largest_prompt * _MAX_GROWTH, 4 * smallest)
        self._smallest = smallest
        self._is_first = True
        self.is_short = False

    def fit(self, start: int, count: int) -> int:
        """How many of `count` prompt tokens from `start` fit into the time left."""
        smallest = self._smallest
        most = min(self._tokens, self._tokens_in(start, self._seconds))
        if count <= most:
            return count
        self.is_short = True
        most -= most % smallest
        return min(count, max(most, smallest)) if self._is_first else most

    def _tokens_in(self, start: int, seconds: float) -> int:
        """The most tokens from `start` that take at most `seconds`; solves the quadratic cost in `spend`."""
        if seconds <= 0:
            return 0
        slope, curve = self._per_token + self._per_context * start, self._per_context / 2
        if curve > 0:
            return int(2 * seconds / (slope + np.sqrt(slope * slope + 4 * curve * seconds)))
        return int(min(seconds / slope, self._tokens)) if slope > 0 else self._tokens

    def spend(self, start: int, count: int) -> None:
        """Subtracts the time of a chunk that was placed in the step."""
        self._is_first = False
        self._tokens -= count
        self._seconds -= self._per_token * count + self._per_context * context_of(start, count)
