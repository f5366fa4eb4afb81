"""Replicas in simulated time.

A replica computes prompts one after another at a fixed rate of tokens, and the answers of all requests
that have their first token at once, the slower the more there are. That is continuous batching in which
prompts come first, without its chunks. Its prefix cache keeps the blocks used last. Frontends know what
replicas tell them, which they do `TELL_SECONDS` after a change, as schedulers do.
"""

from __future__ import annotations

import heapq
import statistics
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from benchmarks.routing.policies import POLICIES
from benchmarks.routing.trace import BLOCK_SIZE, TracedRequest
from pagewire.bench.percentiles import percentile
from pagewire.wire.block_hashes import BlockHash

TELL_SECONDS = 0.02

ARRIVES, COMPUTED, ANSWERED, TELLS = range(4)


@dataclass(frozen=True, slots=True)
class ReplicaSpeed:
    """How fast a replica is and how much it keeps; by default as an 8B model in bf16 on an H200.

    Attributes:
        prompt_tokens: tokens of prompts that it computes a second.
        step: seconds of a step of decodes, and what each request adds to it.
        max_num_seqs: requests computed at once.
        num_blocks: blocks of the KV cache.
    """

    prompt_tokens: float = 30_000.0
    step: float = 0.007
    step_each: float = 0.00004
    max_num_seqs: int = 256
    num_blocks: int = 800_000 // BLOCK_SIZE


class SimulatedReplica:
    """One replica: what waits, what runs, and its prefix cache."""

    def __init__(self, speed: ReplicaSpeed) -> None:
        self.speed = speed
        self.waiting: deque[tuple[TracedRequest, int]] = deque()
        self.is_computing = False
        self.num_running = 0
        self.cache: OrderedDict[BlockHash, None] = OrderedDict()
        self.stored: dict[BlockHash, None] = {}
        self.removed: dict[BlockHash, None] = {}
        self.tells = False

    @property
    def load(self) -> int:
        """Requests that run or wait."""
        return len(self.waiting) + self.is_computing + self.num_running

    def cached_tokens(self, request: TracedRequest) -> int:
        """Tokens of a prompt that need not be computed: at least the last one is."""
        num_blocks = 0
        for block_hash in request.hashes:
            if block_hash not in self.cache:
                break
            num_blocks += 1
        return min(num_blocks * BLOCK_SIZE, request.num_prompt_tokens - 1)

    def keep(self, hashes: Sequence[BlockHash]) -> None:
        """Has blocks in the cache, the last ones to be evicted first."""
        cache = self.cache
        for block_hash in reversed(hashes):
            if block_hash in cache:
                cache.move_to_end(block_hash)
            else:
                cache[block_hash] = None
                self.stored[block_hash] = None
                self.removed.pop(block_hash, None)
        while len(cache) > self.speed.num_blocks:
            evicted, _ = cache.popitem(last=False)
            self.stored.pop(evicted, None)
            self.removed[evicted] = None


class Simulation:
    """A trace through replicas behind frontends with one policy."""

    def __init__(
        self,
        trace: Sequence[TracedRequest],
        policy: str,
        num_replicas: int,
        num_frontends: int,
        speed: ReplicaSpeed,
    ) -> None:
        self._trace, self._first_counted = trace, len(trace) // 5
        self._replicas = [SimulatedReplica(speed) for _ in range(num_replicas)]
        self._frontends = [POLICIES[policy](num_replicas, seed) for seed in range(num_frontends)]
        # What each frontend knows of the load of each replica: its own requests, and others' as last told.
        self._own = [[0] * num_replicas for _ in range(num_frontends)]
        self._loads = [[0] * num_replicas for _ in range(num_frontends)]
        self._events: list[tuple[float, int, int, int, int]] = []
        self._order = count()
        self.first_tokens: list[float] = []
        self.num_cached = self.num_prompt = 0
        self.counts = [0] * num_replicas

    def run(self) -> None:
        """To the end of the trace's last answer."""
        for number, request in enumerate(self._trace):
            self._at(request.at, ARRIVES, number, 0)
        while self._events:
            now, _, kind, number, replica = heapq.heappop(self._events)
            if kind == ARRIVES:
                self._arrive(number, now)
            elif kind == COMPUTED:
                self._computed(number, replica, now)
            elif kind == ANSWERED:
                self._answered(number, replica, now)
            else:
                self._tell(replica)

    def _at(self, when: float, kind: int, number: int, replica: int) -> None:
        heapq.heappush(self._events, (when, next(self._order), kind, number, replica))

    def _arrive(self, number: int, now: float) -> None:
        frontend = number % len(self._frontends)
        loads, request = self._loads[frontend], self._trace[number]
        replica = self._frontends[frontend].choose(request, loads, now)
        loads[replica] += 1
        self._own[frontend][replica] += 1
        self.counts[replica] += 1
        self._replicas[replica].waiting.append((request, number))
        self._go_on(replica, now)

    def _go_on(self, index: int, now: float) -> None:
        """Begins the next prompt, if there is one and room for it."""
        replica = self._replicas[index]
        self._touch(index, now)
        if replica.is_computing or not replica.waiting or replica.num_running >= replica.speed.max_num_seqs:
            return
        request, number = replica.waiting.popleft()
        cached = replica.cached_tokens(request)
        if number >= self._first_counted:
            self.num_cached += cached
            self.num_prompt += request.num_prompt_tokens
        replica.is_computing = True
        replica.keep(request.hashes)
        computed = request.num_prompt_tokens - cached
        seconds = computed / replica.speed.prompt_tokens + self._step(replica)
        self._at(now + seconds, COMPUTED, number, index)

    def _step(self, replica: SimulatedReplica) -> float:
        return replica.speed.step + replica.speed.step_each * replica.num_running

    def _computed(self, number: int, index: int, now: float) -> None:
        replica, request = self._replicas[index], self._trace[number]
        if number >= self._first_counted:
            self.first_tokens.append(now - request.at)
        replica.is_computing = False
        replica.num_running += 1
        seconds = self._step(replica) * (request.num_output_tokens - 1)
        self._at(now + seconds, ANSWERED, number, index)
        self._go_on(index, now)

    def _answered(self, number: int, index: int, now: float) -> None:
        replica = self._replicas[index]
        replica.num_running -= 1
        replica.keep(self._trace[number].later)
        frontend = number % len(self._frontends)
        self._own[frontend][index] -= 1
        self._loads[frontend][index] -= 1
        self._go_on(index, now)

    def _touch(self, index: int, now: float) -> None:
        if not self._replicas[index].tells:
            self._replicas[index].tells = True
            self._at(now + TELL_SECONDS, TELLS, 0, index)

    def _tell(self, index: int) -> None:
        replica = self._replicas[index]
        replica.tells = False
        stored, removed = b"".join(replica.stored), b"".join(replica.removed)
        replica.stored, replica.removed = {}, {}
        for frontend, own, loads in zip(self._frontends, self._own, self._loads, strict=True):
            if stored or removed:
                frontend.changed(index, stored, removed)
            others = replica.load - own[index]
            loads[index] = own[index] + max(0, others)

    def results(self) -> dict[str, float]:
        """What came out."""
        mean = statistics.fmean(self.counts)
        return {
            "hit_rate": round(self.num_cached / self.num_prompt, 4),
            "ttft_p50_ms": round(percentile(self.first_tokens, 50) * 1e3, 1),
            "ttft_p99_ms": round(percentile(self.first_tokens, 99) * 1e3, 1),
            "busiest_to_mean": round(max(self.counts) / mean, 2),
        }
