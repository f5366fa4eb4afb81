"""The frontend's own metrics. The scheduler has the rest; /metrics shows both."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from frontend.inference_counters import InferenceCounters

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(slots=True)
class FrontendMetrics:
    """One registry a process, labelled by host and process id so that several frontends stay apart.

    Attributes:
        before: called before the metrics are told, to set those that change too often to be set each time.
    """

    frontend: str = field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}")
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    before: Callable[[], None] = lambda: None
    inferences: InferenceCounters = field(default_factory=InferenceCounters)
    _finished: Counter = field(init=False)
    open_requests: Gauge = field(init=False)
    _time_to_first_token: Histogram = field(init=False)
    _latency: Histogram = field(init=False)
    tokenize: Histogram = field(init=False)
    scheduler_ready: Gauge = field(init=False)
    scheduler_reconnects: Gauge = field(init=False)
    requests_moved: Gauge = field(init=False)
    _replica_ready: Gauge = field(init=False)
    _routed: Gauge = field(init=False)
    _routed_tokens: Gauge = field(init=False)

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
        self.requests_moved = self._gauge(
            "requests_moved", "Requests that went on at another replica because theirs was lost or drained."
        )
        self._replica_ready = self._replica_gauge("ready", "1 while the replica gets requests, of several.")
        self._routed = self._replica_gauge("requests", "Requests sent to the replica, of several.")
        self._routed_tokens = self._replica_gauge(
            "expected_prefix_tokens", "Tokens of these that the replica had cached, as far as was known."
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

    def _replica_gauge(self, name: str, documentation: str) -> Gauge:
        labels = ("frontend", "replica")
        return Gauge(f"pagewire:frontend_replica_{name}", documentation, labels, registry=self.registry)

    def show_replica(self, replica: str, *, ready: bool, requests: int, prefix_tokens: int) -> None:
        """Sets what is shown of one replica of several."""
        self._replica_ready.labels(self.frontend, replica).set(ready)
        self._routed.labels(self.frontend, replica).set(requests)
        self._routed_tokens.labels(self.frontend, replica).set(prefix_tokens)

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
        self.before()
        return generate_latest(self.registry)
