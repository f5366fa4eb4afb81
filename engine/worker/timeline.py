"""Where the time of a process's start went."""

from __future__ import annotations

import os
import time


class Timeline:
    """Consecutive phases since the process began, each as long as it kept the start waiting."""

    def __init__(self) -> None:
        self._began = self._last = _process_start()
        self._phases: list[tuple[str, float]] = []

    def mark(self, phase: str) -> None:
        """Ends the phase that began with the one before."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        self._phases.append((phase, now - self._last))
        self._last = now

    def __str__(self) -> str:
        phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in self._phases)
        return f"started in {self._last - self._began:.2f} s: {phases}"


def _process_start() -> float:
    """When this process began, in seconds of CLOCK_BOOTTIME (proc(5), field 22 of stat)."""
    with open("/proc/self/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")
