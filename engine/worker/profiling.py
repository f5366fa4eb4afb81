"""What the device did during some steps, as a summary: how busy it was, and with what."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

# The profiler itself delays the first steps that it sees; they are left out.
_SETTLING_STEPS = 5


class StepProfiler:
    """Profiles `num_steps` steps from step `first` on, once, and writes a summary to `path`."""

    def __init__(self, path: Path, first: int, num_steps: int) -> None:
        self._path = path
        self._first = first
        self._last = first + num_steps + _SETTLING_STEPS
        self._num_steps = num_steps
        self._launched = 0
        self._profile: torch.profiler.profile | None = None

    def before_step(self) -> None:
        """Called before each launch."""
        if self._launched == self._first:
            torch.cuda.synchronize()
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profile.start()
        elif self._launched == self._last and self._profile is not None:
            torch.cuda.synchronize()
            self._profile.stop()
            self._write(self._profile)
            self._profile = None
        self._launched += 1

    def _write(self, profile: torch.profiler.profile) -> None:
        spans = sorted(
            (event.time_range.start, event.time_range.end, event.name)
            for event in profile.events()  # type: ignore[no-untyped-call]
            if event.device_type.name == "CUDA"
        )
        summary = summarize(spans, _SETTLING_STEPS / (self._num_steps + _SETTLING_STEPS))
        summary["num_steps"] = self._num_steps
        self._path.write_text(json.dumps(summary, indent=2))
        logger.info("profiled %d steps: %s", self._num_steps, self._path)


def summarize(spans: list[tuple[float, float, str]], skip_share: float) -> dict[str, Any]:
    """How much of the time some operation ran, and each kind's part.

    Args:
        spans: (start, end, name) of every operation on the device, microseconds, in order of start.
        skip_share: how much of the time to leave out at the beginning.
    """
    begin = spans[0][0] + skip_share * (spans[-1][1] - spans[0][0])
    spans = [span for span in spans if span[0] >= begin]
    busy, until = 0.0, spans[0][0]
    by_name: dict[str, list[float]] = defaultdict(list)
    for start, end, name in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
        by_name[name[:80]].append(end - start)
    total = until - spans[0][0]
    operations = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    return {
        "total_us": round(total, 1),
        "busy_percent": round(100 * busy / total, 2),
        "operations": {
            name: {
                "percent": round(100 * sum(times) / total, 2),
                "count": len(times),
                "mean_us": round(sum(times) / len(times), 2),
            }
            for name, times in operations[:40]
        },
    }
