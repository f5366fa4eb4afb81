"""The frontend's own metrics. The scheduler has the rest; /metrics shows both."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from frontend.inference_counters import InferenceCounters

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(slots=True)
class FrontendMetrics:
    """One registry a process, labelled by host and process id so that several frontends stay apart."""

    frontend: str = field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}")
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    inferences: InferenceCounters = field(default_factory=InferenceCounters)
    _finished: Counter = field(init=False)
    open_requests: Gauge = field(init=False)
    _time_to_first_token: Histogram = field(init=False)
    _latency: Histogram = field(init=False)
    tokenize: Histogram = field(init=False)
    scheduler_ready: Gauge = field(init=False)
    scheduler_reconnects: Gauge = field(init=False)

    def __post_init__(self) -> None:
        self._finished = Counter(
            "pagewire:frontend_requests",
            "Requests that ended, by how: stop, length, abort, cancelled or an error's name.",
            ("frontend", "outcome"),
            registry=self.registry,
        )
        self.open_requests = self._gauge("open_requests", "Requests being served by this frontend.")
        self.scheduler_ready = self._gauge(
            "scheduler_ready", "1 while a scheduler with an engine is connected."
        )
        self.scheduler_reconnects = self._gauge(
            "scheduler_reconnects", "How often the scheduler was lost and came back."
        )
        self._time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first delta."
        )
        self._latency = self._histogram(
            "request_latency_seconds", "From a request's arrival to its end, however it ended."
        )
        self.tokenize = self._histogram(
            "tokenize_seconds", "Rendering and tokenizing a prompt, waiting for a thread included."
        )

    def _gauge(self, name: str, documentation: str) -> Gauge:
        gauge = Gauge(f"pagewire:frontend_{name}", documentation, ("frontend",), registry=self.registry)
        return gauge.labels(self.frontend)

    def _histogram(self, name: str, documentation: str) -> Histogram:
        histogram = Histogram(
            f"pagewire:frontend_{name}",
            documentation,
            ("frontend",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        return histogram.labels(self.frontend)

    def observe(self, began: float, first_token_at: float | None, outcome: str) -> None:
        """Records a request that ended just now; times are `time.perf_counter`'s."""
        if first_token_at is not None:
            self._time_to_first_token.observe(first_token_at - began)
        self._latency.observe(time.perf_counter() - began)
        self._finished.labels(self.frontend, outcome).inc()

    def exposition(self) -> bytes:
        """Prometheus text format, version 0.0.4."""
        return generate_latest(self.registry)
