"""One process's share of a run: sends its requests when they are due and collects what comes back."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from pagewire.bench.serve.answer import Answer
from pagewire.bench.serve.dataset_files import Trace
from pagewire.bench.serve.datasets import Dataset
from pagewire.bench.serve.health import Health, LagMeter
from pagewire.bench.serve.load import Load

WRITTEN_AHEAD = 4096
"""Requests that are written before a run begins; others, for which there may be no room, when due."""


class LoadClient(Protocol):
    """What sends requests: HttpClient or GrpcClient."""

    async def models(self) -> list[str]:
        """The models that the server lists."""

    async def prepare(self, connections: int) -> None:
        """Opens connections ahead."""

    def request(self, prompt: list[int] | str, max_tokens: int) -> Any:
        """What `send` takes, written ahead."""

    async def send(self, request: Any, answer: Answer) -> None:
        """Sends a request and fills the answer until it ends."""

    async def close(self) -> None:
        """Closes every connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A run, as every process is told of it.

    Attributes:
        run: its name; contents and arrivals are drawn by it.
        load, dataset: what is sent when.
        uses_trace: whether requests are due when the trace says, instead of the load's rate.
        share, num_shares: which of the requests this process sends: those whose number leaves `share`.
    """

    run: str
    load: Load
    dataset: Dataset
    uses_trace: bool = False
    share: int = 0
    num_shares: int = 1

    @property
    def concurrency(self) -> int | None:
        """The most requests of this share that are open at once."""
        total = self.load.concurrency
        if total is None:
            return None
        return total // self.num_shares + (self.share < total % self.num_shares)


@dataclass(slots=True)
class _Planned:
    offset: float
    request: Any
    answer: Answer


class ShareRun:
    """Prepares a share, then runs it.

    Attributes:
        answers: of every request sent so far.
    """

    def __init__(self, client: LoadClient, point: Point) -> None:
        self._client = client
        self._point = point
        self._load = point.load
        self._stopped = asyncio.Event()
        self._planned = self._plan()
        self.answers: list[Answer] = []

    async def prepare(self) -> None:
        """Writes requests ahead, and opens the connections that will be needed at once.

        Raises:
            Unavailable: the server cannot be reached.
        """
        ahead = None if self._load.is_burst else WRITTEN_AHEAD
        self._planned = itertools.chain(list(itertools.islice(self._planned, ahead)), self._planned)
        await self._client.prepare(self._connections())
        gc.collect()  # takes a tenth of a second where much is imported: now, lest the run begin late

    def stop(self) -> None:
        """Sends nothing more and gives up what is open; `run` returns."""
        self._stopped.set()

    async def run(self, begin: float) -> Health:
        """Sends everything, from `begin` (time.perf_counter) on, and waits for the answers."""
        with _no_collector():
            await asyncio.sleep(max(0.0, begin - time.perf_counter()))
            meter = LagMeter()
            work = asyncio.create_task(self._closed(begin) if self._load.is_closed else self._open(begin))
            stopped = asyncio.create_task(self._stopped.wait())
            await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
            health = meter.stop()
        stopped.cancel()
        if work.done():
            work.result()
        else:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        return health

    def _plan(self) -> Iterator[_Planned]:
        point = self._point
        for index, offset in enumerate(self._offsets()):
            if index % point.num_shares == point.share:
                ask = point.dataset.ask(point.run, index)
                request = self._client.request(ask.prompt, ask.output_len)
                yield _Planned(offset, request, Answer(index, ask.prompt_len, ask.output_len))

    def _offsets(self) -> Iterator[float]:
        load, dataset = self._load, self._point.dataset
        if not self._point.uses_trace or not isinstance(dataset, Trace):
            yield from load.offsets()
            return
        for index in range(len(dataset.entries)):
            at = dataset.offset(index)
            if index == load.num_requests or (load.duration is not None and at >= load.duration):
                return
            yield at

    def _connections(self) -> int:
        if self._load.is_closed:
            return self._point.concurrency or 0
        if self._load.is_burst and not self._point.uses_trace and self._load.num_requests is not None:
            return -(-self._load.num_requests // self._point.num_shares)
        return 1

    async def _closed(self, begin: float) -> None:
        """As many loops as may be open, each of which sends its next request when its last has ended."""
        deadline = begin + self._load.duration if self._load.duration is not None else float("inf")

        async def loop() -> None:
            while time.perf_counter() < deadline:
                planned = next(self._planned, None)
                if planned is None:
                    return
                await self._send(planned)

        async with asyncio.TaskGroup() as group:
            for _ in range(self._point.concurrency or 0):
                group.create_task(loop())

    async def _open(self, begin: float) -> None:
        """Each request when it is due, whatever has become of the others."""
        limit = self._point.concurrency
        gate = asyncio.Semaphore(limit) if limit is not None else None

        async def gated(planned: _Planned, gate: asyncio.Semaphore) -> None:
            async with gate:
                await self._send(planned)

        async with asyncio.TaskGroup() as group:
            for planned in self._planned:
                due = begin + planned.offset
                delay = due - time.perf_counter()
                if delay > 0:
                    await asyncio.sleep(delay)
                if gate is not None:
                    group.create_task(gated(planned, gate))
                else:
                    if not self._load.is_burst:
                        planned.answer.due = due
                    group.create_task(self._send(planned))

    async def _send(self, planned: _Planned) -> None:
        self.answers.append(planned.answer)
        await self._client.send(planned.request, planned.answer)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Python's cyclic collector would stop the loop for milliseconds, over objects that live to the end."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def warm_up(client: LoadClient, dataset: Dataset, count: int, concurrency: int) -> list[Answer]:
    """Sends requests that are not measured, so many at a time."""
    load = Load(concurrency=max(1, min(count, concurrency)), num_requests=count)
    run = ShareRun(client, Point(run="warm-up", load=load, dataset=dataset))
    await run.prepare()
    await run.run(time.perf_counter())
    return run.answers
