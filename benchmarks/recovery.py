"""How long open streams pause when a process behind them is killed.

A real `pagewire serve` with streams that are always open. Again and again the worker, then the scheduler, is
killed with SIGKILL; what counts is the time from the kill to the next token, of the stream that goes on first
and of the one that goes on last. Tokens that arrive within 50 ms of the kill were on their way already and do
not count. Between two kills the service runs for longer than the supervisor's back-off remembers.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import psutil

from benchmarks import record
from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from pagewire.supervisor.child import STABLE_SECONDS
from tests.e2e.service import Service

IN_TRANSIT_SECONDS = 0.05
PROMPT_TOKENS = 64
RECOVER_SECONDS = 120.0
ROLES = ("engine-worker", "scheduler")


class Streams:
    """Greedy streams that are opened anew when they end, and when each last gained a token."""

    def __init__(self, channel: grpc.aio.Channel, count: int, max_tokens: int) -> None:
        self._stub = inference_pb2_grpc.InferenceServiceStub(channel)
        self._max_tokens = max_tokens
        self.arrivals: list[list[float]] = [[] for _ in range(count)]
        self.failures: list[str] = []
        self._tasks = [asyncio.create_task(self._stream(index)) for index in range(count)]

    async def _stream(self, index: int) -> None:
        salt = index
        while True:
            ids = [(salt * 7919 + position * 31) % 40_000 + 100 for position in range(PROMPT_TOKENS)]
            sampling = pb.SamplingParams(temperature=0, max_tokens=self._max_tokens, ignore_eos=True)
            request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=sampling)
            try:
                async for event in self._stub.Generate(request):
                    if event.HasField("delta"):
                        self.arrivals[index].append(time.monotonic())
            except grpc.aio.AioRpcError as error:
                self.failures.append(f"{error.code().name}: {error.details()}")
                await asyncio.sleep(0.5)
            salt += len(self.arrivals)

    async def next_tokens(self, after: float) -> list[float]:
        """When each stream first gained a token after this time."""
        deadline = time.monotonic() + RECOVER_SECONDS
        while True:
            firsts = [next((at for at in times if at > after), None) for times in self.arrivals]
            found = [at for at in firsts if at is not None]
            if len(found) == len(firsts):
                return found
            if time.monotonic() > deadline:
                raise SystemExit(f"{len(firsts) - len(found)} streams did not go on; {self.failures}")
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def pid_of(service: Service, role: str) -> int:
    return service.processes()[role].pid


async def kill_once(service: Service, streams: Streams, role: str) -> dict[str, float]:
    """Kills a process; seconds until the first and the last stream goes on, and of processor time."""
    process = psutil.Process(pid_of(service, role))
    os.kill(process.pid, signal.SIGKILL)
    killed = time.monotonic()
    times = await streams.next_tokens(killed + IN_TRANSIT_SECONDS)
    successor = service.processes()[role]
    return {
        "first_s": round(min(times) - killed, 3),
        "last_s": round(max(times) - killed, 3),
        "successor_processor_s": round(sum(successor.cpu_times()[:2]), 2),
    }


async def measure(service: Service, arguments: argparse.Namespace) -> dict[str, Any]:
    """All kills."""
    results: dict[str, Any] = {}
    async with grpc.aio.insecure_channel(service.grpc_target) as channel:
        for role in ROLES:
            streams = Streams(channel, arguments.streams, arguments.max_tokens)
            kills = []
            for _ in range(arguments.kills):
                await streams.next_tokens(time.monotonic())
                await asyncio.sleep(STABLE_SECONDS + 1)
                kills.append(await kill_once(service, streams, role))
                print(role, kills[-1], flush=True)
            await streams.close()
            results[role] = {**summary(kills), "failed_requests": streams.failures, "kills": kills}
    return results


def summary(kills: Sequence[dict[str, float]]) -> dict[str, float]:
    """Median and worst over all kills."""
    return {
        f"{name}_{label}": round(of([kill[name] for kill in kills]), 3)
        for name in ("first_s", "last_s")
        for label, of in (("median", statistics.median), ("worst", max))
    }


def main() -> None:
    """Measures and reports."""
    parser = record.parser(__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each process")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=1500)
    parser.add_argument("--engine", default="model", help="or null")
    arguments = parser.parse_args()
    options: tuple[str, ...] = ("--engine", "null", "--null-step-ms", "10")
    if arguments.engine == "model":
        options = ()
    with tempfile.TemporaryDirectory() as directory, Service(Path(directory), options=options) as service:
        results = asyncio.run(measure(service, arguments))
    results["streams"], results["engine"] = arguments.streams, arguments.engine
    record.write(arguments.json, results)


if __name__ == "__main__":
    main()
