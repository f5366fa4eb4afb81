"""What those who watch are told of: the pool, the queues, the prefix cache and the steps, bounded in size."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from engine.dispatch.records import StepResult
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from scheduler.blocks.prefix_tree import PrefixTree, prefix_tree
from scheduler.core import Scheduler
from scheduler.policy.step_time import StepWork
from scheduler.request import Request, Status
from scheduler.serve.metrics import SchedulerMetrics
from scheduler.serve.outbox import ticket_of

MAX_PLACES = 4096
"""Blocks that a message tells of; of larger pools, it is every second one, or every third, and so on."""

MAX_REQUESTS = 64
MAX_STEPS = 200

MAX_OWNED_BLOCKS = 65_536
"""Blocks whose owners are looked for. Each takes some 40 ns, during which nothing is scheduled."""

MAX_LATENCIES = 2048
"""Measurements of a latency that are kept between two messages, the last ones."""

PREFIX_SECONDS = 2.0
MAX_PREFIX_BLOCKS = 2048
MAX_PREFIX_NODES = 120
"""The tree of prefixes is made less often, because each of its blocks takes some microseconds."""

_MAX_ROOT = 255


class Latencies:
    """Measurements since they were last taken."""

    def __init__(self) -> None:
        self._measured: deque[tuple[float, int]] = deque(maxlen=MAX_LATENCIES)

    def add(self, seconds: float, times: int) -> None:
        """Adds a value that was measured several times."""
        self._measured.append((seconds, times))

    def take(self) -> pb.ObservedLatency:
        """Percentiles of what was measured; forgets it."""
        if not self._measured:
            return pb.ObservedLatency()
        seconds, times = np.array(self._measured).T
        self._measured.clear()
        order = np.argsort(seconds)
        so_far = np.cumsum(times[order])
        p50, p95 = (
            float(seconds[order[np.searchsorted(so_far, share * so_far[-1])]]) for share in (0.5, 0.95)
        )
        return pb.ObservedLatency(count=int(so_far[-1]), p50=p50, p95=p95)


@dataclass(slots=True, eq=False)
class Observer:
    """One who watches. The driver and the metrics add to it; `take` makes a message of it."""

    time_to_first_token: Latencies = field(default_factory=Latencies)
    inter_token_latency: Latencies = field(default_factory=Latencies)
    _steps: deque[pb.ObservedStep] = field(default_factory=lambda: deque(maxlen=MAX_STEPS))
    _num_steps: int = 0
    _prefixes_due: float = 0.0

    @contextmanager
    def measuring(self, metrics: SchedulerMetrics) -> Iterator[None]:
        """Has the latencies told to this observer."""
        pairs = (
            (metrics.time_to_first_token, self.time_to_first_token),
            (metrics.inter_token_latency, self.inter_token_latency),
        )
        for histogram, latencies in pairs:
            histogram.watchers.append(latencies.add)
        try:
            yield
        finally:
            for histogram, latencies in pairs:
                histogram.watchers.remove(latencies.add)

    def step(self, result: StepResult, work: StepWork | None, execute_us: Sequence[int]) -> None:
        """Adds a step whose result has come.

        Args:
            result: the result.
            work: the amount of work in the step; None if it is not known any more.
            execute_us: microseconds that each rank spent on it.
        """
        work = work or StepWork()
        self._num_steps += 1
        self._steps.append(
            pb.ObservedStep(
                step_id=result.step_id,
                ended=time.perf_counter(),
                execute_us=execute_us,
                num_decodes=work.num_decodes,
                num_prompt_tokens=work.num_prompt,
                failed=bool(result.error),
            )
        )

    def take(
        self, core: Scheduler | None, load: pb.GetLoadResponse, metrics: SchedulerMetrics
    ) -> pb.ObserveResponse:
        """The state now, and what happened since the last call."""
        now = time.perf_counter()
        message = pb.ObserveResponse(
            ready=core is not None,
            time=now,
            load=load,
            totals=_totals(metrics),
            time_to_first_token=self.time_to_first_token.take(),
            inter_token_latency=self.inter_token_latency.take(),
            steps=self._steps,
            num_steps_left_out=self._num_steps - len(self._steps),
        )
        self._steps.clear()
        self._num_steps = 0
        if core is None:
            self._prefixes_due = 0.0
            return message
        running, waiting = core.some_requests(MAX_REQUESTS)
        message.requests.extend(_request(core, request, now) for request in [*running, *waiting])
        message.blocks.CopyFrom(_blocks(core, running))
        if now >= self._prefixes_due:
            self._prefixes_due = now + PREFIX_SECONDS
            tree = prefix_tree(core.pool, max_blocks=MAX_PREFIX_BLOCKS, max_nodes=MAX_PREFIX_NODES)
            message.prefixes.CopyFrom(_prefixes(tree, core.pool.num_blocks))
        return message


def _totals(metrics: SchedulerMetrics) -> pb.ObservedTotals:
    totals = metrics.totals()
    return pb.ObservedTotals(
        steps=totals["steps"],
        computed_tokens=totals["computed_tokens"],
        generated_tokens=totals["generation_tokens"],
        prefix_queries=totals["prefix_cache_queries"],
        prefix_hits=totals["prefix_cache_hits"],
        preemptions=totals["num_preemptions"],
        evictions=totals["kv_cache_evictions"],
        ended_requests=metrics.num_ended,
        worker_losses=metrics.num_worker_losses,
    )


def _request(core: Scheduler, request: Request, now: float) -> pb.ObservedRequest:
    running = request.status is Status.RUNNING
    return pb.ObservedRequest(
        number=request.arrival,
        request_id=request.request_id,
        client=request.client,
        running=running,
        num_prompt_tokens=request.num_prompt_tokens,
        num_cached_tokens=max(0, request.num_cached_tokens),
        num_computed_tokens=core.num_computed(request) if running else 0,
        num_output_tokens=request.num_output_tokens,
        max_total_tokens=request.max_total_tokens,
        num_blocks=len(request.block_ids),
        age=now - ticket_of(request).submitted_at,
        num_preemptions=request.num_preemptions,
        adapter_id=request.adapter_id,
    )


def _stride(num_blocks: int) -> int:
    return -(-num_blocks // MAX_PLACES) or 1


def _blocks(core: Scheduler, running: Sequence[Request]) -> pb.ObservedBlocks:
    num_blocks = core.pool.num_blocks
    stride = _stride(num_blocks)
    ref_counts, cached = core.pool.sample(stride)
    owners = np.zeros(len(ref_counts), np.uint8)
    num_left = MAX_OWNED_BLOCKS
    for index, request in enumerate(running):
        num_left -= len(request.block_ids)
        if num_left < 0:
            break
        held = np.array(request.block_ids, np.int64)
        held = held[(held >= 0) & (held % stride == 0)]
        owners[held // stride] = index + 1
    return pb.ObservedBlocks(stride=stride, ref_counts=ref_counts, cached=cached, owners=owners.tobytes())


def _prefixes(tree: PrefixTree, num_blocks: int) -> pb.ObservedPrefixes:
    stride = _stride(num_blocks)
    roots = np.zeros(-(-num_blocks // stride), np.uint8)
    for index, node in enumerate(tree.nodes):
        held = np.array(node.block_ids, np.int64)
        roots[held[held % stride == 0] // stride] = min(tree.root_of(index) + 1, _MAX_ROOT)
    nodes = [
        pb.ObservedPrefix(
            first_block=node.block_ids[0],
            parent=node.parent,
            num_blocks=len(node.block_ids),
            num_hits=node.num_hits,
            num_held=node.num_held,
        )
        for node in tree.nodes
    ]
    return pb.ObservedPrefixes(nodes=nodes, num_left_out=tree.num_left_out, roots=roots.tobytes())
