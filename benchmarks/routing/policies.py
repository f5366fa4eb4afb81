"""Who gets a request: the policies that are compared. Each frontend has an instance of its own."""

from __future__ import annotations

import bisect
import random
from hashlib import blake2b
from typing import Protocol

from benchmarks.routing.trace import TracedRequest
from frontend.replicas.router import Router


class Policy(Protocol):
    """Chooses replicas for one frontend."""

    def choose(self, request: TracedRequest, loads: list[int], now: float) -> int:
        """The replica for a request.

        Args:
            loads: requests that run or wait at each replica, as far as the frontend knows.
        """

    def changed(self, replica: int, stored: bytes, removed: bytes) -> None:
        """A replica tells which blocks have come and gone."""


class RoundRobin:
    """Each in turn."""

    def __init__(self, num_replicas: int, seed: int) -> None:
        self._num_replicas, self._next = num_replicas, random.Random(seed).randrange(num_replicas)

    def choose(self, request: TracedRequest, loads: list[int], now: float) -> int:
        self._next = (self._next + 1) % self._num_replicas
        return self._next

    def changed(self, replica: int, stored: bytes, removed: bytes) -> None:
        """It does not matter."""


class LeastLoaded:
    """The one with the fewest requests, any of them where there are several."""

    def __init__(self, num_replicas: int, seed: int) -> None:
        self._random = random.Random(seed)

    def choose(self, request: TracedRequest, loads: list[int], now: float) -> int:
        least = min(loads)
        return self._random.choice([replica for replica, load in enumerate(loads) if load == least])

    def changed(self, replica: int, stored: bytes, removed: bytes) -> None:
        """It does not matter."""


class ConsistentHashing:
    """By the request's session, on a ring on which each replica has many places."""

    PLACES = 128

    def __init__(self, num_replicas: int, seed: int) -> None:
        places = sorted(
            (_hash(f"{replica}/{place}"), replica)
            for replica in range(num_replicas)
            for place in range(self.PLACES)
        )
        self._hashes = [each for each, _ in places]
        self._replicas = [replica for _, replica in places]

    def choose(self, request: TracedRequest, loads: list[int], now: float) -> int:
        place = bisect.bisect(self._hashes, _hash(str(request.session))) % len(self._hashes)
        return self._replicas[place]

    def changed(self, replica: int, stored: bytes, removed: bytes) -> None:
        """It does not matter."""


class LongestPrefix:
    """What frontends do: `frontend.replicas.router.Router`."""

    def __init__(self, num_replicas: int, seed: int) -> None:
        self._router = Router(seed=seed)
        self._candidates = range(num_replicas)

    def choose(self, request: TracedRequest, loads: list[int], now: float) -> int:
        return self._router.choose(request.hashes, loads, self._candidates, now).replica

    def changed(self, replica: int, stored: bytes, removed: bytes) -> None:
        self._router.index.stored(replica, stored)
        self._router.index.removed(replica, removed)


POLICIES: dict[str, type[RoundRobin | LeastLoaded | ConsistentHashing | LongestPrefix]] = {
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "consistent_hashing": ConsistentHashing,
    "longest_prefix": LongestPrefix,
}


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
