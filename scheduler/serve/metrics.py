"""The scheduler's Prometheus metrics, under the names common among inference servers, prefixed pagewire:."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.registry import Collector

from engine.dispatch.facts import WorkerFacts
from pagewire.telemetry.gpus import GpuReading, Gpus
from scheduler.core import Scheduler
from scheduler.request import EndReason, Request
from scheduler.serve.adapters import AdapterManager
from scheduler.serve.outbox import Ticket

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_TOKENS = tuple(float(2**power) for power in range(15))
_REQUEST_TOKENS = tuple(float(2**power) for power in range(18))


class Histogram:
    """A histogram: observations counted per bucket.

    Attributes:
        watchers: called with each value and how often it was observed.
    """

    def __init__(self, name: str, documentation: str, bounds: tuple[float, ...]) -> None:
        self._name, self._documentation, self._bounds = name, documentation, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self.watchers: list[Callable[[float, int], None]] = []

    def observe(self, value: float, times: int = 1) -> None:
        """Counts an observation, or several of the same value."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times
        for watcher in self.watchers:
            watcher(value, times)

    def family(self) -> HistogramMetricFamily:
        """The histogram as a Prometheus metric family."""
        names = [*(str(bound) for bound in self._bounds), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        return HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=self._sum)


class SchedulerMetrics(Collector):
    """Gathers counts as the driver reports events; reads the rest from the core when scraped.

    Args:
        core: returns the current core, or None while no engine is attached.
        batching_strategy: how requests are batched.
        facts: returns the worker's facts, or None before the first was attached.
    """

    def __init__(
        self,
        core: Callable[[], Scheduler | None],
        batching_strategy: str,
        facts: Callable[[], WorkerFacts | None] = lambda: None,
    ) -> None:
        self._core = core
        self._facts, self._batching_strategy = facts, batching_strategy
        self._totals: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self.num_worker_losses = 0
        self.adapters: AdapterManager | None = None
        self._prompt_tokens = 0
        self.time_to_first_token = _seconds("time_to_first_token", "From submission to the first token")
        self.inter_token_latency = _seconds("inter_token_latency", "Between tokens of a request")
        self.e2e_request_latency = _seconds("e2e_request_latency", "From submission to the end")
        self.queue_time = _seconds("request_queue_time", "From submission to the first step")
        self.prefill_time = _seconds("request_prefill_time", "From the first step to the first token")
        self.decode_time = _seconds("request_decode_time", "From the first to the last token")
        self.inference_time = _seconds("request_inference_time", "From the first step to the last token")
        self.step_time = _seconds("step_execute_time", "What the worker spent on a step")
        self.iteration_tokens = Histogram(
            "pagewire:iteration_tokens_total", "Tokens computed in a step", _TOKENS
        )
        self.request_prompt_tokens = Histogram(
            "pagewire:request_prompt_tokens", "Prompt tokens of an ended request", _REQUEST_TOKENS
        )
        self.request_generation_tokens = Histogram(
            "pagewire:request_generation_tokens", "Tokens generated for an ended request", _REQUEST_TOKENS
        )
        self._gpus = Gpus()
        self._gpu_readings: list[GpuReading] = []
        self._registry = CollectorRegistry()
        self._registry.register(self)

    async def exposition(self) -> bytes:
        """Everything in Prometheus text format."""
        self._gpu_readings = await asyncio.to_thread(self._gpus.read)
        return generate_latest(self._registry)

    def scheduled(self, ticket: Ticket, now: float) -> None:
        """Records that a request was admitted for the first time."""
        ticket.scheduled_at = now
        self.queue_time.observe(now - ticket.submitted_at)

    def tokens(self, tickets: list[Ticket], now: float) -> None:
        """Records one token per request. Requests whose previous token came at the same time are observed
        together.
        """
        times = [ticket.last_token_at for ticket in tickets]
        for last_token_at in set(times):
            if last_token_at:
                self.inter_token_latency.observe(now - last_token_at, times.count(last_token_at))
            else:
                self._first_tokens([ticket for ticket in tickets if not ticket.last_token_at], now)
        for ticket in tickets:
            ticket.last_token_at = now

    def _first_tokens(self, tickets: list[Ticket], now: float) -> None:
        for ticket in tickets:
            ticket.first_token_at = now
            self.time_to_first_token.observe(now - ticket.submitted_at)
            self.prefill_time.observe(now - ticket.scheduled_at)

    def ended(self, request: Request, ticket: Ticket, now: float) -> None:
        """Records that a request ended."""
        reason = request.end_reason or EndReason.ABORT
        self._finished[reason.name.lower()] += 1
        self._prompt_tokens += request.num_prompt_tokens
        self.e2e_request_latency.observe(now - ticket.submitted_at)
        self.request_prompt_tokens.observe(request.num_prompt_tokens)
        self.request_generation_tokens.observe(request.num_output_tokens)
        if ticket.first_token_at:
            self.inference_time.observe(ticket.last_token_at - ticket.scheduled_at)
            self.decode_time.observe(ticket.last_token_at - ticket.first_token_at)

    def refused(self, code: str) -> None:
        """Records that a submission was refused."""
        self._refused[code] += 1

    def retire(self, core: Scheduler) -> None:
        """Adds up the totals of a core that is replaced, so that counters never decrease."""
        self._totals.update(_totals(core))

    def totals(self) -> Counter[str]:
        """The counters of this scheduler's cores, by name without prefix."""
        core = self._core()
        return self._totals + Counter(_totals(core) if core else {})

    @property
    def num_ended(self) -> int:
        """Requests that ended, however they did."""
        return self._finished.total()

    def collect(self) -> Iterator[Any]:
        """Called by prometheus_client at every scrape."""
        core = self._core()
        totals = self.totals()
        for name, documentation in _COUNTERS.items():
            yield CounterMetricFamily(f"pagewire:{name}", documentation, value=totals[name])
        yield CounterMetricFamily(
            "pagewire:prompt_tokens", "Prompt tokens of ended requests", self._prompt_tokens
        )
        yield CounterMetricFamily(
            "pagewire:worker_losses", "How often the engine-worker was lost", self.num_worker_losses
        )
        yield InfoMetricFamily(
            "pagewire:batching", "How requests are batched", value={"strategy": self._batching_strategy}
        )
        facts = self._facts()
        if facts is not None:
            kind = {
                "dtype": facts.dtype,
                "quantization": facts.quantization or "none",
                "kv_cache_dtype": facts.kv_cache_dtype or facts.dtype,
            }
            yield InfoMetricFamily("pagewire:engine", "What the engine computes with", value=kind)
            told = {"kernels": facts.kernels or "none", "weights": facts.weights or "none"}
            yield InfoMetricFamily("pagewire:kernels", "What computes, and on what weights", value=told)
        yield _labelled("request_success", "Ended requests", "finished_reason", self._finished)
        yield _labelled("request_refused", "Refused submissions", "code", self._refused)
        for name, documentation, value in _gauges(core):
            yield GaugeMetricFamily(f"pagewire:{name}", documentation, value=value)
        yield from _of_adapters(self.adapters)
        yield from _gpu_gauges(self._gpu_readings)
        for histogram in vars(self).values():
            if isinstance(histogram, Histogram):
                yield histogram.family()


_COUNTERS = {
    "num_preemptions": "Requests sent back to wait, for memory or for another client",
    "steps": "Steps planned",
    "batches": "Batches begun, where requests are not batched in flight",
    "short_steps": "Steps that left out tokens of prompts for the target of the inter-token latency",
    "computed_tokens": "Tokens whose KV was computed",
    "generation_tokens": "Tokens generated",
    "requests_quarantined": "Requests ended because the engine failed over them",
    "prefix_cache_queries": "Tokens looked up in the prefix cache",
    "prefix_cache_hits": "Tokens found in the prefix cache",
    "kv_cache_evictions": "Cached blocks overwritten",
    "spec_decode_num_drafts": "How often draft tokens were proposed for a request",
    "spec_decode_num_draft_tokens": "Draft tokens proposed",
    "spec_decode_num_accepted_tokens": "Draft tokens accepted",
}


def _totals(core: Scheduler) -> dict[str, int]:
    counters = core.counters
    return {
        "num_preemptions": counters.num_preemptions,
        "steps": counters.num_steps,
        "batches": core.num_batches,
        "short_steps": counters.num_short_steps,
        "computed_tokens": counters.num_computed_tokens,
        "generation_tokens": counters.num_generated_tokens,
        "requests_quarantined": counters.num_quarantined,
        "prefix_cache_queries": counters.prefix_cache_queries,
        "prefix_cache_hits": counters.prefix_cache_hits,
        "kv_cache_evictions": core.pool.num_evictions,
        "spec_decode_num_drafts": counters.num_drafts,
        "spec_decode_num_draft_tokens": counters.num_draft_tokens,
        "spec_decode_num_accepted_tokens": counters.num_accepted_tokens,
    }


def _gauges(core: Scheduler | None) -> Iterator[tuple[str, str, float]]:
    running, waiting, used, cached, total, steps, clients, margin = 0, 0, 0, 0, 0, 0, 0, 1.0
    if core is not None:
        clients, margin = core.num_clients_waiting, core.step_times.margin
        running, waiting, steps = core.num_running, core.num_waiting, core.num_in_flight
        used, cached, total = core.pool.num_used, core.pool.num_cached, core.pool.num_blocks
    yield "num_requests_running", "Requests being computed", running
    yield "num_requests_waiting", "Requests admitted but not being computed", waiting
    yield "num_clients_waiting", "Clients that have requests waiting", clients
    yield "step_time_margin", "How many times their predicted time the slower steps with prompts take", margin
    yield "num_steps_in_flight", "Steps whose result has not come back", steps
    yield "kv_cache_usage_perc", "Share of KV blocks held by requests, 0 to 1", used / total if total else 0.0
    yield "kv_cache_used_blocks", "KV blocks held by requests", used
    yield "kv_cache_cached_blocks", "KV blocks that can be found by content", cached
    yield "kv_cache_blocks", "KV blocks in the pool", total


def _gpu_gauges(readings: list[GpuReading]) -> Iterator[GaugeMetricFamily]:
    """Nothing without a GPU or NVML."""
    if not readings:
        return
    for name, documentation in _GPU_GAUGES.items():
        family = GaugeMetricFamily(f"pagewire:gpu_{name}", documentation, labels=["gpu", "gpu_uuid"])
        for reading in readings:
            value = getattr(reading, name.removesuffix("_bytes"))
            family.add_metric([str(reading.index), reading.uuid], value)
        yield family


_GPU_GAUGES = {
    "utilization": "Share of the last moments in which a kernel ran on the GPU, 0 to 1",
    "memory_used_bytes": "Memory of the GPU that is in use, by all processes",
    "memory_total_bytes": "Memory that the GPU has",
}


def _seconds(name: str, documentation: str) -> Histogram:
    return Histogram(f"pagewire:{name}_seconds", documentation, _SECONDS)


def _labelled(name: str, documentation: str, label: str, counts: Counter[str]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"pagewire:{name}", documentation, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family


def _of_adapters(adapters: AdapterManager | None) -> Iterator[Any]:
    names = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
    info = GaugeMetricFamily(
        "pagewire:lora_requests_info", "Adapters of open requests; the time", labels=names
    )
    requests = CounterMetricFamily(
        "pagewire:adapter_requests", "Ended requests of each adapter", labels=["adapter"]
    )
    tokens = CounterMetricFamily(
        "pagewire:adapter_generation_tokens", "Tokens generated with each adapter", labels=["adapter"]
    )
    if adapters is not None:
        num_slots, running, waiting = adapters.in_use()
        if num_slots:
            info.add_metric([str(num_slots), ",".join(running), ",".join(waiting)], time.time())
        for family, counts in ((requests, adapters.num_requests), (tokens, adapters.num_tokens)):
            for name, count in counts.items():
                family.add_metric([name], count)
    yield from (info, requests, tokens)
