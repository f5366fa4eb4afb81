"""Chooses a replica for each request: the longest cached prefix, bounded by load.

The bound is that of consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, 2016): no replica
gets a request that would make its load more than `BOUND` times the average. Up to `FEW` requests a replica is
never too loaded, since a step with so few takes hardly longer than one with a single request.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from frontend.replicas.prefix_index import PrefixIndex
from pagewire.wire.block_hashes import BlockHash

BOUND = 2.0
FEW = 4


@dataclass(frozen=True, slots=True)
class Choice:
    """A replica that was chosen.

    Attributes:
        replica: its number.
        num_blocks: how many of the request's blocks it has, or is about to have.
    """

    replica: int
    num_blocks: int


class Router:
    """Knows the prefixes of all replicas; the loads come with each question. It does no I/O and reads no
    clock, so that the simulator (benchmarks/routing) runs this very code.

    Attributes:
        index: which replicas have which blocks.
    """

    def __init__(self, *, bound: float = BOUND, few: int = FEW, seed: int | None = None) -> None:
        self.index = PrefixIndex()
        self._bound, self._few = bound, few
        # Several frontends that began at the same replica would fill it first.
        self._turn = random.Random(seed).randrange(1 << 16)

    def choose(
        self, hashes: Sequence[BlockHash], loads: Sequence[float], candidates: Sequence[int], now: float
    ) -> Choice:
        """Chooses one of the candidates, and expects it to have the request's blocks soon.

        Args:
            hashes: of the request's full blocks that could be shared.
            loads: requests that run or wait, by replica.
            candidates: numbers of the replicas that take requests; at least one.
            now: seconds of any clock that does not go back.
        """
        limit = self._limit(sum(loads[each] for each in candidates), len(candidates))
        open_to_it = [each for each in candidates if loads[each] < limit]
        among = sum([1 << each for each in open_to_it])
        among, num_blocks = self.index.longest(hashes, among)
        if num_blocks:
            open_to_it = [each for each in open_to_it if among >> each & 1]
        replica = self._least_loaded(open_to_it, loads)
        self.index.expect(replica, hashes, now)
        return Choice(replica, num_blocks)

    def _limit(self, total: float, count: int) -> float:
        """Replicas with a smaller load may get one more request; there always is one."""
        return max(self._few, math.ceil(self._bound * (total + 1) / count))

    def _least_loaded(self, candidates: Sequence[int], loads: Sequence[float]) -> int:
        """Equal ones in turn."""
        least = min(loads[each] for each in candidates)
        equal = [each for each in candidates if loads[each] == least]
        self._turn += 1
        return equal[self._turn % len(equal)]
