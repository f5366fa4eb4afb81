"""How long a launch takes the device, and the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import triton

Call = Callable[[], Any]

_MIN_LAUNCHES = 8
_COPY_BYTES = 1 << 30


@triton.jit
def _nothing_kernel():
    pass


@dataclass(frozen=True, slots=True)
class Timer:
    """How often things are repeated.

    Attributes:
        warm_up, replays: of a graph of launches, before it is timed and while it is.
        host_calls: calls without a graph.
    """

    warm_up: int
    replays: int
    host_calls: int

    def device_us(self, calls: list[Call]) -> float:
        """Median device time of a call, in a graph that makes each at least once and eight at least."""
        for call in calls[:2]:
            call()
        launches = max(len(calls), _MIN_LAUNCHES)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(launches):
                calls[i % len(calls)]()
        for _ in range(self.warm_up):
            graph.replay()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self.replays + 1)]
        for event in events[:-1]:
            event.record()
            graph.replay()
        events[-1].record()
        torch.cuda.synchronize()
        milliseconds = [begin.elapsed_time(end) for begin, end in pairwise(events)]
        return statistics.median(milliseconds) * 1e3 / launches

    def host_us(self, call: Call) -> float:
        """Host time of a call that does not wait for the device."""
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(self.host_calls):
            call()
        elapsed = time.perf_counter() - began
        torch.cuda.synchronize()
        return elapsed / self.host_calls * 1e6

    def empty_launch_us(self, launches: int) -> float:
        """Device time of a kernel that does nothing, among so many of them."""
        return self.device_us([lambda: _nothing_kernel[(1,)]()] * launches)

    def copy_bandwidth(self) -> float:
        """Bytes read and written a second by a large copy on the device."""
        source = torch.randn(_COPY_BYTES // 4, device="cuda")
        target = torch.empty_like(source)
        return 2 * _COPY_BYTES / self.device_us([lambda: target.copy_(source)]) * 1e6
