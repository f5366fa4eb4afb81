"""Runs points of a sweep, in this process or spread over several."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any, Self, TypeVar

import uvloop

from pagewire.base.errors import PagewireError, Unavailable
from pagewire.bench.serve.answer import Answer
from pagewire.bench.serve.datasets import Dataset
from pagewire.bench.serve.health import Health
from pagewire.bench.serve.load import Load
from pagewire.bench.serve.share import LoadClient, Point, ShareRun, warm_up
from pagewire.bench.serve.target import Target

STREAMS_PER_PROCESS, RATE_PER_PROCESS = 64, 16.0
"""What one process of grpc.aio is given: so many open requests, or so many new ones a second. At 50 tokens a
second for each stream that is a third of a core."""
START_DELAY = 0.1
"""Seconds between the word to begin and the beginning, so that every process is ready for it."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Measured:
    """A point's outcome.

    Attributes:
        answers: of every request that was sent.
        health: of each process.
        interrupted: whether Ctrl-C ended it.
    """

    answers: list[Answer]
    health: list[Health]
    interrupted: bool = False


def new_client(target: Target) -> LoadClient:
    """The client for a target's protocol."""
    if target.is_grpc:
        from pagewire.bench.serve.grpc_client import GrpcClient

        return GrpcClient(target)
    from pagewire.bench.serve.http_client import HttpClient

    return HttpClient(target)


def suitable_processes(target: Target, loads: Sequence[Load]) -> int:
    """How many processes such loads take: one over HTTP; over gRPC as many as their open requests or their
    rate need, and no more than there are cores."""
    if not target.is_grpc:
        return 1
    return min(len(os.sched_getaffinity(0)), max(map(_grpc_processes, loads)))


def _grpc_processes(load: Load) -> int:
    most_open = load.num_requests if load.is_burst else load.concurrency
    wanted = load.rate / RATE_PER_PROCESS
    if most_open is not None:
        wanted = min(wanted, most_open / STREAMS_PER_PROCESS)
    return math.ceil(wanted)


class Generator:
    """Sends from this process. A context manager.

    Attributes:
        num_processes: how many send.
    """

    num_processes = 1

    def __init__(self, target: Target) -> None:
        self._target = target
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._client: LoadClient | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            self._runner.run(self._client.close())
        self._runner.close()

    def first_model(self) -> str:
        """The first model that the server lists.

        Raises:
            PagewireError: the server cannot be reached or lists none.
        """
        return self._with_client(lambda client: client.models())[0]

    def use_model(self, model: str) -> None:
        """From now on requests ask for it."""
        self._target = replace(self._target, model=model)
        if self._client is not None:
            self._runner.run(self._client.close())
            self._client = None

    def warm_up(self, dataset: Dataset, count: int, concurrency: int) -> list[Answer]:
        """Sends requests that are not measured; returns their answers."""
        return self._with_client(lambda client: warm_up(client, dataset, count, concurrency))

    def measure(self, point: Point) -> Measured:
        """Runs a point.

        Raises:
            Unavailable: the server cannot be reached.
        """
        return self._with_client(lambda client: _measure(client, point))

    def _with_client(self, work: Callable[[LoadClient], Coroutine[Any, Any, Result]]) -> Result:
        async def run() -> Result:
            if self._client is None:
                self._client = new_client(self._target)
            return await work(self._client)

        return self._runner.run(run())


async def _measure(client: LoadClient, point: Point) -> Measured:
    loop = asyncio.get_running_loop()
    run = ShareRun(client, point)
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        run.stop()

    await run.prepare()
    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        health = await run.run(time.perf_counter() + START_DELAY)
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    return Measured(run.answers, [health], interrupted)


class SpreadGenerator(Generator):
    """Sends from several processes, each with its own connections and every n-th request."""

    def __init__(self, target: Target, num_processes: int) -> None:
        super().__init__(target)
        self.num_processes = num_processes
        self._children: list[tuple[Any, Connection]] = []

    def __exit__(self, *error: object) -> None:
        for process, connection in self._children:
            connection.close()  # a child ends when it reads that
            process.join(5)
            if process.is_alive():
                process.kill()
        super().__exit__(*error)

    def measure(self, point: Point) -> Measured:
        """See Generator."""
        if not self._children:
            self._start()
        used = min(self.num_processes, point.load.concurrency or self.num_processes)
        connections = [connection for _, connection in self._children[:used]]
        for share, connection in enumerate(connections):
            connection.send(("prepare", replace(point, share=share, num_shares=used)))
        interrupted = _gather(connections)[1]
        for connection in connections:
            connection.send(("begin", time.perf_counter() + START_DELAY))
        if interrupted:
            _tell_to_stop(connections)
        results, interrupted_later = _gather(connections)
        answers = [answer for share, _ in results for answer in share]
        return Measured(answers, [health for _, health in results], interrupted or interrupted_later)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for number in range(self.num_processes):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_child, args=(theirs, self._target), name=f"load-{number}", daemon=True
            )
            process.start()
            theirs.close()
            self._children.append((process, ours))


def _gather(connections: list[Connection]) -> tuple[list[Any], bool]:
    """One message of each child, and whether Ctrl-C was pressed meanwhile.

    Raises:
        PagewireError: a child reports one, or is gone.
    """
    received: dict[Connection, Any] = {}
    interrupted = False
    while len(received) < len(connections):
        try:
            for ready in wait([each for each in connections if each not in received]):
                assert isinstance(ready, Connection)
                received[ready] = ready.recv()
        except KeyboardInterrupt:
            interrupted = True
            _tell_to_stop(connections)
        except (EOFError, ConnectionError) as error:
            raise Unavailable("a process of the load generator has ended before its work") from error
    for message in received.values():
        if isinstance(message, PagewireError):
            raise message
    return [received[connection] for connection in connections], interrupted


def _tell_to_stop(connections: list[Connection]) -> None:
    for connection in connections:
        connection.send(("stop", None))


def _child(connection: Connection, target: Target) -> None:
    """A process that runs shares until its parent closes the pipe. Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve_parent(connection, target))


async def _serve_parent(connection: Connection, target: Target) -> None:
    messages: asyncio.Queue[tuple[str, Any] | None] = asyncio.Queue()
    run: ShareRun | None = None

    def read() -> None:
        try:
            message = connection.recv()
        except (EOFError, ConnectionError):
            asyncio.get_running_loop().remove_reader(connection.fileno())
            message = None
        if run is not None and (message is None or message[0] == "stop"):
            run.stop()
        if message is None or message[0] != "stop":
            messages.put_nowait(message)

    asyncio.get_running_loop().add_reader(connection.fileno(), read)
    os.set_blocking(connection.fileno(), True)  # uvloop has changed it, and answers may be larger than a pipe
    client = new_client(target)
    while (message := await messages.get()) is not None:
        try:
            if message[0] == "prepare":
                run = ShareRun(client, message[1])
                await run.prepare()
                connection.send(None)
            elif run is not None:
                health = await run.run(message[1])
                connection.send((run.answers, health))
        except PagewireError as error:
            connection.send(error)
    await client.close()
