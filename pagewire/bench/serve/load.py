"""When requests are sent: at a rate, or as soon as another has ended, and until when."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from pagewire.base.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One point of a sweep.

    Attributes:
        rate: requests a second; infinite sends them all at once, or as `concurrency` lets them.
        concurrency: the most requests that are open at once; None is no limit.
        burstiness: shape of the gamma distribution of the times between arrivals: 1 is a Poisson process,
            less comes in bursts, more is more even.
        num_requests: how many are sent; None is as many as `duration` has room for.
        duration: seconds after which none is sent; those that are open then are waited for.
        seed: of the arrivals.
    """

    rate: float = math.inf
    concurrency: int | None = None
    burstiness: float = 1.0
    num_requests: int | None = None
    duration: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rate", "burstiness", "concurrency", "num_requests", "duration"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}; it must be more than 0", param=name)
        if self.num_requests is None and (self.duration is None or self.is_burst):
            raise ConfigError(
                "nothing says when to stop: give --num-requests, or --duration with --rate or --concurrency",
                param="num_requests",
            )

    @property
    def is_burst(self) -> bool:
        """Whether everything is sent at once."""
        return math.isinf(self.rate) and self.concurrency is None

    @property
    def is_closed(self) -> bool:
        """Whether only the end of a request lets another one begin."""
        return math.isinf(self.rate) and self.concurrency is not None

    def offsets(self) -> Iterator[float]:
        """Seconds from the start at which requests are due, in order; the first is due at once. Never ends
        by itself where there is neither a number nor a duration that would end it."""
        generator = random.Random(f"arrivals {self.seed}")
        at = 0.0
        for _ in itertools.count() if self.num_requests is None else range(self.num_requests):
            if self.duration is not None and at >= self.duration:
                return
            yield at
            if not math.isinf(self.rate):
                at += generator.gammavariate(self.burstiness, 1 / (self.rate * self.burstiness))

    def __str__(self) -> str:
        if self.is_burst:
            return "all at once"
        parts = [] if math.isinf(self.rate) else [f"{self.rate:g} per second"]
        if self.concurrency is not None:
            parts.append(f"{self.concurrency} at a time")
        return ", ".join(parts)
