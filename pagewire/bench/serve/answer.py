"""What one request got, as it comes in; both protocols fill it."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field


def _no_times() -> array[float]:
    return array("d")


@dataclass(slots=True)
class Answer:
    """One request's record. All times are `time.perf_counter`, which is one clock for a machine's processes.

    Attributes:
        index: the request's number in its run.
        prompt_len, wanted_len: tokens that its prompt was made with, and that it asked for.
        due: when it was to be sent; NaN where that is "as soon as another one has ended".
        sent: when it was sent, connecting included; NaN if it never was.
        times: the arrival of every piece of output.
        ended: when its last piece, or its failure, arrived; NaN while it is open.
        prompt_tokens, cached_tokens, output_tokens: as the server counts them; None where it does not.
        finish_reason: as the server says it.
        error: why it failed: its kind, such as "HTTP 429", and what was said; "" if it did not.
        retries: times it was sent again because a kept connection turned out to be closed.
    """

    index: int
    prompt_len: int
    wanted_len: int
    due: float = math.nan
    sent: float = math.nan
    times: array[float] = field(default_factory=_no_times)
    ended: float = math.nan
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str = ""
    error: str = ""
    retries: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether it was answered to its end."""
        return not self.error and not math.isnan(self.ended)

    @property
    def num_outputs(self) -> int:
        """Output tokens: as the server counts them, else the pieces they came in."""
        return len(self.times) if self.output_tokens is None else self.output_tokens

    @property
    def num_inputs(self) -> int:
        """Prompt tokens: as the server counts them, else as many as the prompt was made with."""
        return self.prompt_len if self.prompt_tokens is None else self.prompt_tokens

    def fail(self, reason: str, now: float) -> None:
        """Ends it with an error; the first one counts."""
        if not self.error:
            self.error = reason
        self.ended = now
