"""How many requests ended how, and what their time went into, as Triton's metrics and statistics tell it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

_FAILURES = {
    # By how a request ended (see Admitted.outcome_of); everything else that is no success is OTHER.
    "abort": "CANCELED",
    "cancelled": "CANCELED",
    "Overloaded": "REJECTED",
    "Unavailable": "REJECTED",
    "PagewireError": "BACKEND",
}
_SUCCESSES = frozenset(("stop", "length", "tool_calls", "embedded", "classified", "scored"))

FAILURE_REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
"""Why a request failed, in Triton's words."""


@dataclass(slots=True)
class InferenceCounters:
    """Totals since the frontend was started. Times are in seconds and, but for `failed`, of successes alone.

    Attributes:
        successes: requests that succeeded.
        failures: requests that did not, by FAILURE_REASONS.
        inferences: prompts of the requests that succeeded.
        request: from arrival to end.
        failed: the same, of requests that failed.
        compute_input: from arrival until the scheduler was asked: reading, rendering, tokenizing.
        queue: from then until the request was first computed.
        compute_infer: from then to the end.
        last_ended: Unix time when the last request ended; 0 before the first.
    """

    successes: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    inferences: int = 0
    request: float = 0.0
    failed: float = 0.0
    compute_input: float = 0.0
    queue: float = 0.0
    compute_infer: float = 0.0
    last_ended: float = 0.0

    def ended(
        self,
        outcome: str,
        *,
        began: float,
        submitted_at: float | None,
        scheduled_at: float | None,
        num_prompts: int,
    ) -> None:
        """Counts a request that ended just now.

        Args:
            outcome: how it ended, see `Admitted.outcome_of`.
            began, submitted_at, scheduled_at: `time.perf_counter` at its arrival, when the scheduler was
                asked and when it was first computed, as far as it came.
            num_prompts: how many prompts it had.
        """
        now = time.perf_counter()
        self.last_ended = time.time()
        if outcome not in _SUCCESSES:
            self.failures[_FAILURES.get(outcome, "OTHER")] += 1
            self.failed += now - began
            return
        submitted = began if submitted_at is None else submitted_at
        scheduled = submitted if scheduled_at is None else scheduled_at
        self.successes += 1
        self.inferences += num_prompts
        self.request += now - began
        self.compute_input += submitted - began
        self.queue += scheduled - submitted
        self.compute_infer += now - scheduled
