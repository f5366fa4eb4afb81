"""Whether the load generator itself kept up: a client at its limit measures itself, not the server."""

from __future__ import annotations

import asyncio
import time
from array import array
from dataclasses import dataclass

TICK_SECONDS = 0.01
MAX_LAG_MS = 5.0
MAX_CPU = 0.9


@dataclass(frozen=True, slots=True)
class Health:
    """How one process of the load generator fared.

    Attributes:
        cpu_seconds, wall_seconds: while requests were open.
        delays: seconds by which each tick of its event loop was late.
    """

    cpu_seconds: float
    wall_seconds: float
    delays: array[float]


class LagMeter:
    """Watches the running event loop from its start to `stop`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._delays: array[float] = array("d")
        self._began, self._cpu_began = time.perf_counter(), time.process_time()
        self._expected = self._began + TICK_SECONDS
        self._timer = self._loop.call_later(TICK_SECONDS, self._tick)

    def _tick(self) -> None:
        now = time.perf_counter()
        self._delays.append(max(0.0, now - self._expected))
        self._expected = now + TICK_SECONDS
        self._timer = self._loop.call_later(TICK_SECONDS, self._tick)

    def stop(self) -> Health:
        """Ends the watch."""
        self._timer.cancel()
        wall = time.perf_counter() - self._began
        return Health(time.process_time() - self._cpu_began, wall, self._delays)
