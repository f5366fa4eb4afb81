"""What clients wait for each other, through a real `pagewire serve`.

1. Streams decode while long prompts arrive: the gaps between their tokens, alone, beside the prompts, and
   beside the prompts with `--target-itl-ms`.
2. One client sends a flood of requests at once, another one request a second: what the other waits for its
   first tokens, alone, beside the flood, and beside the flood where both are one client.

By default the engine is the null engine, whose steps take a set time and so much more for each prompt token:
the figures then show scheduler, frontends and processes, not a model. With --model-engine they are a model's.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from benchmarks import record
from benchmarks.flood import USER, lengths
from benchmarks.requests import greedy, prompt
from engine.dispatch.limits import EngineLimits
from pagewire.bench.percentiles import percentile
from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from scheduler.settings import CoreSettings
from tests.unit.scheduler.simulation import SimulatedService
from tools.service import Service

NUM_STREAMS = 20
CASES = ("streams", "flood", "simulated")
PATIENCE = 30.0
"""Seconds that are waited where clients are not told apart."""


@dataclass(frozen=True)
class Plan:
    """What is served, and how it is loaded.

    Attributes:
        options: of `pagewire serve`, in every case.
        target_itl_ms: in the cases with a target; None takes 1.3 times the undisturbed median.
        stream_tokens: that streams may generate; more than they come to.
        long_prompt: tokens of the prompts that disturb.
        prompt_period: seconds between them, or as long as one takes.
        seconds: how long each case of the first kind is measured.
        flood: how many requests come at once, of prompts and answers of so many tokens.
        flood_prompt, flood_answer: the range of each.
        newcomer_prompt: tokens of the other client's prompts.
        newcomers: how many of them, one a second; half as many alone.
    """

    options: tuple[str, ...]
    target_itl_ms: float | None
    stream_tokens: int
    long_prompt: int
    prompt_period: float
    seconds: float
    flood: int
    flood_prompt: tuple[int, int]
    flood_answer: tuple[int, int]
    newcomer_prompt: int
    newcomers: int


NULL = Plan(
    options=(
        "--engine",
        "null",
        "--null-step-ms",
        "20",
        "--null-prompt-us",
        "25",
        "--max-model-len",
        "32768",
        "--max-num-seqs",
        "64",
        "--no-access-log",
    ),
    target_itl_ms=27.0,
    stream_tokens=30_000,
    long_prompt=8000,
    prompt_period=1.5,
    seconds=30.0,
    flood=1000,
    flood_prompt=(50, 250),
    flood_answer=(100, 900),
    newcomer_prompt=2000,
    newcomers=120,
)
MODEL = Plan(
    options=("--max-num-seqs", "32", "--no-access-log"),
    target_itl_ms=None,
    stream_tokens=7000,
    long_prompt=8000,
    prompt_period=1.0,
    seconds=60.0,
    flood=1000,
    flood_prompt=(16, 48),
    flood_answer=(32, 96),
    newcomer_prompt=512,
    newcomers=30,
)


def asking(length: int, salt: int, max_tokens: int, user: str = "") -> pb.GenerateRequest:
    """A request that generates exactly `max_tokens`."""
    return greedy(prompt(length, salt), max_tokens, user=user)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Milliseconds at p50, p90, p99 and the most."""
    listed = list(values)
    percents = {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    return {
        "count": len(listed),
        **{name: round(1e3 * percentile(listed, percent), 1) for name, percent in percents.items()},
    }


def slowest(values: Sequence[float], count: int = 5) -> dict[int, float]:
    """Milliseconds of the largest, by their place."""
    places = sorted(range(len(values)), key=lambda place: -values[place])[:count]
    return {place: round(1e3 * values[place], 1) for place in sorted(places)}


class Client:
    """Times requests over the public gRPC API."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = inference_pb2_grpc.InferenceServiceStub(channel)

    async def first_token(self, request: pb.GenerateRequest) -> float:
        """Seconds until the first token; the rest is read too."""
        began = time.perf_counter()
        call = self._stub.Generate(request)
        first = 0.0
        async for response in call:
            if not first and response.HasField("delta"):
                first = time.perf_counter() - began
        return first

    async def token_times(self, request: pb.GenerateRequest, enough: asyncio.Event) -> list[float]:
        """When each delta came, until there are enough."""
        times: list[float] = []
        call = self._stub.Generate(request)
        while not enough.is_set() and await call.read() is not grpc.aio.EOF:
            times.append(time.perf_counter())
        call.cancel()
        return times


async def gaps(client: Client, plan: Plan, *, disturbed: bool) -> tuple[list[float], list[float]]:
    """Gaps between the tokens of streams, all together, and the prompts' times to first token."""
    enough = asyncio.Event()
    longest = [asking(32, index, plan.stream_tokens) for index in range(NUM_STREAMS)]
    streams = [asyncio.create_task(client.token_times(request, enough)) for request in longest]
    await asyncio.sleep(3.0)
    began = time.perf_counter()
    waited: list[float] = []
    while time.perf_counter() - began < plan.seconds:
        pause = asyncio.create_task(asyncio.sleep(plan.prompt_period))
        if disturbed:
            waited.append(await client.first_token(asking(plan.long_prompt, 1000 + len(waited), 1)))
        await pause
    ended = time.perf_counter()
    enough.set()
    times = await asyncio.gather(*streams)
    measured = [[at for at in each if began <= at <= ended] for each in times]
    return [after - before for each in measured for before, after in itertools.pairwise(each)], waited


async def streams_beside_prompts(directory: Path, plan: Plan) -> dict[str, Any]:
    """The first case."""
    results: dict[str, Any] = {}
    target = plan.target_itl_ms
    for name in ("without_target", "with_target"):
        given: tuple[str, ...] = ()
        if name == "with_target":
            if target is None:
                target = round(1.3 * results["undisturbed"]["itl_ms"]["p50"], 1)
            given = ("--target-itl-ms", str(target))
        with Service(directory, options=(*plan.options, *given)) as service:
            async with grpc.aio.insecure_channel(service.grpc_target) as channel:
                client = Client(channel)
                if name == "without_target":
                    alone, _ = await gaps(client, plan, disturbed=False)
                    results["undisturbed"] = {"itl_ms": spread(alone)}
                beside, waited = await gaps(client, plan, disturbed=True)
        results[name] = {"itl_ms": spread(beside), "prompts_ttft_ms": spread(waited)}
    p99 = results["undisturbed"]["itl_ms"]["p99"]
    for name in ("without_target", "with_target"):
        results[name]["p99_to_undisturbed"] = round(results[name]["itl_ms"]["p99"] / p99, 2)
    return {"streams": NUM_STREAMS, "prompt_tokens": plan.long_prompt, "target_itl_ms": target, **results}


async def newcomer(client: Client, plan: Plan, user: str, salt: int, count: int) -> list[float]:
    """Times to first token of one request a second, each sent when its second comes."""

    async def one(number: int) -> float:
        await asyncio.sleep(number + 0.01 * (number * 37 % 100))
        return await client.first_token(asking(plan.newcomer_prompt, salt + number, 8, user))

    return await asyncio.gather(*map(one, range(count)))


async def answered_within(client: Client, plan: Plan, user: str, seconds: float) -> dict[str, Any]:
    """Whether one request gets a token in this time."""
    try:
        async with asyncio.timeout(seconds):
            waited = await client.first_token(asking(plan.newcomer_prompt, 5000, 8, user))
    except TimeoutError:
        return {"answered": f"not within {seconds:g} s"}
    return {"answered": f"after {waited:.1f} s"}


@asynccontextmanager
async def flooded(target: str, plan: Plan) -> AsyncIterator[Callable[[], Awaitable[int]]]:
    """Another process sends the flood; what is given ends it and tells how many answers were missing then."""
    sizes = ("--requests", plan.flood, "--prompt", *plan.flood_prompt, "--answer", *plan.flood_answer)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.flood", target, *map(str, sizes)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    async def end() -> int:
        stdin.close()
        return int(await stdout.readline())

    try:
        await stdout.readline()
        yield end
    finally:
        stdin.close()
        await process.wait()


async def beside_a_flood(directory: Path, plan: Plan) -> dict[str, Any]:
    """The second case."""
    results: dict[str, Any] = {}
    for name, user in (("two_clients", "other"), ("one_client", USER)):
        with Service(directory, options=plan.options) as service:
            async with grpc.aio.insecure_channel(service.grpc_target) as channel:
                client = Client(channel)
                await newcomer(client, plan, "warm", 500, 3)
                if name == "two_clients":
                    results["alone"] = spread(await newcomer(client, plan, user, 1000, plan.newcomers // 2))
                async with flooded(service.grpc_target, plan) as end:
                    await asyncio.sleep(1.0)
                    if name == "two_clients":
                        waited = await newcomer(client, plan, user, 5000, plan.newcomers)
                        results[name] = {**spread(waited), "slowest_ms_by_second": slowest(waited)}
                    else:
                        results[name] = await answered_within(client, plan, user, PATIENCE)
                    results[name]["flood_left_at_the_end"] = await end()
                results[name]["preempted"] = round(service.metrics()["pagewire:num_preemptions_total"])
    results["p99_to_alone"] = round(results["two_clients"]["p99"] / results["alone"]["p99"], 2)
    results["median_to_alone"] = round(results["two_clients"]["p50"] / results["alone"]["p50"], 2)
    return {"flood": plan.flood, "newcomer_prompt_tokens": plan.newcomer_prompt, "ttft_ms": results}


def simulated(plan: Plan) -> dict[str, Any]:
    """The second case as the scheduler's core alone decides it, in time that only steps move: what is left
    of it without frontends, processes and whatever else runs on the machine.
    """
    given = dict(zip(plan.options[::2], plan.options[1::2], strict=False))
    step, token = float(given["--null-step-ms"]) * 1e-3, float(given["--null-prompt-us"]) * 1e-6
    limits = EngineLimits(
        num_blocks=65_536,
        block_size=16,
        max_num_seqs=int(given["--max-num-seqs"]),
        max_num_batched_tokens=8192,
        max_model_len=int(given["--max-model-len"]),
        vocab_size=1 << 20,
    )
    settings = CoreSettings(max_num_waiting=2 * plan.flood)
    waited = {}
    for name, flood in (("alone", 0), ("two_clients", plan.flood)):
        service = SimulatedService(limits, lambda work: step + token * work.num_prompt, settings)
        for index, (prompt_tokens, answer) in enumerate(lengths(flood, plan.flood_prompt, plan.flood_answer)):
            service.add(f"flood{index}", prompt_tokens, answer, client=USER)
        waited[name] = [_simulated_newcomer(service, plan, number) for number in range(plan.newcomers)]
    results: dict[str, Any] = {name: spread(values) for name, values in waited.items()}
    results["p99_to_alone"] = round(results["two_clients"]["p99"] / results["alone"]["p99"], 2)
    return {"ttft_ms": results}


def _simulated_newcomer(service: SimulatedService, plan: Plan, number: int) -> float:
    name, arrival = f"new{number}", 1.0 + number + 0.01 * (number * 37 % 100)

    def arrive() -> None:
        service.add(name, plan.newcomer_prompt, 8, client="other")
        service.added[name] = arrival  # while a step went on

    service.arrivals.append((arrival, arrive))
    while name not in service.times:
        if not service.step():
            service.now = arrival
    return service.first_token_after(name)


async def measure(plan: Plan, directory: Path, cases: Sequence[str]) -> dict[str, Any]:
    """The cases that were asked for."""
    results: dict[str, Any] = {"options": " ".join(plan.options)}
    if "streams" in cases:
        results["streams_beside_prompts"] = await streams_beside_prompts(directory, plan)
    if "flood" in cases:
        results["beside_a_flood"] = await beside_a_flood(directory, plan)
    if "simulated" in cases:
        results["beside_a_flood_simulated"] = simulated(plan)
    return results


def main() -> None:
    """Measures and writes the record."""
    parser = record.parser(__doc__)
    parser.add_argument("--model-engine", action="store_true", help="serve SmolLM2 instead of no model")
    parser.add_argument(
        "--case", action="append", choices=("streams", "flood", "simulated"), help="only this one"
    )
    arguments = parser.parse_args()
    plan = MODEL if arguments.model_engine else NULL
    with tempfile.TemporaryDirectory() as directory:
        cases = arguments.case or CASES[:2]
        record.write(arguments.json, asyncio.run(measure(plan, Path(directory), cases)))


if __name__ == "__main__":
    main()
