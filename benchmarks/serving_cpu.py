"""What the service does for its clients on a CPU, shown by ratios within one run.

SmolLM2-135M behind a real `pagewire serve`: how much sooner the first token comes after a cached prefix, how
much sooner 16 streams finish together than one after another, how long a long prompt holds up a running
stream, and how long the service takes to start.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc

from benchmarks import record
from benchmarks.requests import greedy, prompt
from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from tools.service import Service

PREFIX_TOKENS, SUFFIX_TOKENS, PREFIX_ROUNDS = 1000, 24, 5
NUM_STREAMS, PROMPT_TOKENS, OUTPUT_TOKENS = 16, 128, 64
LONG_PROMPT_TOKENS = 2048


class Client:
    """Times requests over the public gRPC API."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = inference_pb2_grpc.InferenceServiceStub(channel)

    async def first_token(self, request: pb.GenerateRequest) -> float:
        """Seconds until the first token; the request is dropped then."""
        began = time.perf_counter()
        call = self._stub.Generate(request)
        await call.read()
        seconds = time.perf_counter() - began
        call.cancel()
        return seconds

    async def token_times(self, request: pb.GenerateRequest) -> list[float]:
        """When each delta came."""
        return [time.perf_counter() async for _ in self._stub.Generate(request)]

    async def complete(self, request: pb.GenerateRequest) -> None:
        """Waits for the whole answer."""
        await self._stub.GenerateOnce(request)


async def prefix_reuse(client: Client) -> dict[str, Any]:
    """First-token time of a prompt, and of another that shares its first thousand tokens."""
    cold, warm = [], []
    for round_ in range(PREFIX_ROUNDS):
        shared = prompt(PREFIX_TOKENS, 100 + round_)
        cold.append(await client.first_token(greedy(shared + prompt(SUFFIX_TOKENS, 1), 8)))
        warm.append(await client.first_token(greedy(shared + prompt(SUFFIX_TOKENS, 2), 8)))
    return {
        "cold_ttft_s": round(statistics.median(cold), 3),
        "warm_ttft_s": round(statistics.median(warm), 3),
        "times_sooner": round(statistics.median(cold) / statistics.median(warm), 1),
    }


async def concurrency(client: Client) -> dict[str, Any]:
    """The same number of requests one after another and at once, with fresh prompts: nothing is cached."""
    began = time.perf_counter()
    for salt in range(NUM_STREAMS):
        await client.complete(greedy(prompt(PROMPT_TOKENS, 200 + salt), OUTPUT_TOKENS))
    alone = time.perf_counter() - began
    began = time.perf_counter()
    requests = [greedy(prompt(PROMPT_TOKENS, 300 + salt), OUTPUT_TOKENS) for salt in range(NUM_STREAMS)]
    await asyncio.gather(*map(client.complete, requests))
    together = time.perf_counter() - began
    return {
        "one_after_another_s": round(alone, 2),
        "together_s": round(together, 2),
        "times_sooner": round(alone / together, 1),
        "output_tokens_per_s_together": round(NUM_STREAMS * OUTPUT_TOKENS / together, 1),
    }


async def long_prompt(client: Client) -> dict[str, Any]:
    """Gaps between a stream's tokens while another request's long prompt is computed, in chunks."""
    stream = asyncio.create_task(client.token_times(greedy(prompt(32, 400), 120)))
    await asyncio.sleep(1.0)
    began = time.perf_counter()
    first_token_s = await client.first_token(greedy(prompt(LONG_PROMPT_TOKENS, 401), 1))
    ended = time.perf_counter()
    times = await stream
    gaps = [(after, after - before) for before, after in itertools.pairwise(times)]
    during = [gap for at, gap in gaps if began <= at <= ended]
    outside = [gap for at, gap in gaps if not began <= at <= ended]
    return {
        "long_prompt_ttft_s": round(first_token_s, 2),
        "stream_gap_alone_median_s": round(statistics.median(outside), 3),
        "stream_gap_during_median_s": round(statistics.median(during), 3),
        "stream_gap_during_max_s": round(max(during), 3),
        "tokens_streamed_meanwhile": len(during),
    }


async def measure(dtype: str, directory: Path) -> dict[str, Any]:
    """All cases against one service."""
    began = time.perf_counter()
    with Service(directory, options=("--dtype", dtype)) as service:
        ready = time.perf_counter() - began
        async with grpc.aio.insecure_channel(service.grpc_target) as channel:
            client = Client(channel)
            await client.first_token(greedy(prompt(16, 1), 1))
            first = time.perf_counter() - began
            await client.complete(greedy(prompt(64, 2), 16))  # warm-up
            return {
                "startup": {"ready_s": round(ready, 2), "first_token_s": round(first, 2)},
                f"prefix of {PREFIX_TOKENS} tokens": await prefix_reuse(client),
                f"{NUM_STREAMS} x {PROMPT_TOKENS}/{OUTPUT_TOKENS}": await concurrency(client),
                f"prompt of {LONG_PROMPT_TOKENS} beside a stream": await long_prompt(client),
            }


def main() -> None:
    """Measures and reports."""
    arguments = record.parser(__doc__).parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        for dtype in ("float32", "bfloat16"):
            results[dtype] = asyncio.run(measure(dtype, Path(directory)))
    record.write(arguments.json, results)


if __name__ == "__main__":
    main()
