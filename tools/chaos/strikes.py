"""Kills processes of a service, or stops them as if they hung, at random times."""

from __future__ import annotations

import asyncio
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from tools.chaos.processes import ROLES, living, replica_of, role_of
from tools.service import Service

HANG = "hang"
REPLICA = "replica"
KINDS = (*ROLES, HANG, REPLICA)
# How likely each is, and that a second one comes with it at the same moment.
WEIGHTS = {"engine-worker": 3, "scheduler": 3, "frontend": 3, HANG: 1, REPLICA: 2}
TWO_AT_ONCE = 0.15
_AGAIN_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Strike:
    """What was done to a process, and when (`time.monotonic`)."""

    kind: str
    at: float


class Strikes:
    """Chooses and hits. A process is hit once; one that hangs is left to the service's own watchdog.

    Args:
        say: told of every strike.

    Attributes:
        done: everything, in order.
    """

    def __init__(self, service: Service, seed: int, say: Callable[[str], None] = lambda _: None) -> None:
        self.done: list[Strike] = []
        self._say = say
        self._service = service
        self._random = random.Random(seed)
        self._hit: set[int] = set()
        self._kinds = KINDS if "scheduler-0" in living(service) else (*ROLES, HANG)

    async def at_random(self, seconds: float, mean_interval: float) -> None:
        """A Poisson process of strikes for so long."""
        end = time.monotonic() + seconds
        while True:
            pause = self._random.expovariate(1 / mean_interval)
            if time.monotonic() + pause > end:
                return
            await asyncio.sleep(pause)
            kinds = [self._draw()]
            if self._random.random() < TWO_AT_ONCE:
                kinds.append(self._draw())
            for kind in kinds:
                self.strike(kind)

    async def strike_each(self, kinds: Sequence[str]) -> None:
        """Hits all of these as soon as there is one of each that was not hit before."""
        left = list(kinds)
        while left:
            left = [kind for kind in left if not self.strike(kind)]
            await asyncio.sleep(_AGAIN_SECONDS)

    def strike(self, kind: str) -> bool:
        """Hits a process that was not hit before, or all of a replica; whether there was one."""
        if kind == REPLICA:
            return self._strike_replica()
        role = "engine-worker" if kind == HANG else kind
        targets = [
            process
            for name, process in living(self._service).items()
            if role_of(name) == role and process.pid not in self._hit and self._may_be_hit(process, kind)
        ]
        if not targets:
            return False
        target = self._random.choice(targets)
        try:
            target.send_signal(signal.SIGSTOP if kind == HANG else signal.SIGKILL)
        except psutil.NoSuchProcess:
            return False
        self._hit.add(target.pid)
        self.done.append(Strike(kind, time.monotonic()))
        self._say(f"{kind}, pid {target.pid}")
        return True

    def _strike_replica(self) -> bool:
        """Kills the scheduler and the workers of a replica at once."""
        replicas: dict[str, list[psutil.Process]] = {}
        for name, process in living(self._service).items():
            if replica_of(name) and process.pid not in self._hit:
                replicas.setdefault(replica_of(name), []).append(process)
        whole = [each for each in replicas.values() if len(each) > 1]
        if not whole:
            return False
        for process in self._random.choice(whole):
            process.send_signal(signal.SIGKILL)
            self._hit.add(process.pid)
            self.done.append(Strike(REPLICA, time.monotonic()))
            self._say(f"{REPLICA}, pid {process.pid}")
        return True

    def _may_be_hit(self, process: psutil.Process, kind: str) -> bool:
        """A worker that hangs while it starts is not noticed: nobody knows how long a start may take."""
        return kind != HANG or bool(
            re.search(rf"attached to worker [\d, ]*\b{process.pid}\b", self._service.log)
        )

    @property
    def counts(self) -> Counter[str]:
        """Strikes by kind; each process of a replica counts."""
        return Counter(each.kind for each in self.done)

    def frontend_killed_at(self) -> float:
        """When a frontend was last killed."""
        return max((each.at for each in self.done if each.kind == "frontend"), default=-1e9)

    def _draw(self) -> str:
        return self._random.choices(self._kinds, [WEIGHTS[kind] for kind in self._kinds])[0]
