"""What `pagewire bench serve` itself costs: CPU time of its process for each token it receives.

First its parsing alone, from memory. Then whole clients against the null engine, whose step is slow enough
that every token of every stream arrives alone, which is what costs most: those of the load generator (over
HTTP its own, over gRPC grpc.aio), and aiohttp with a JSON decoder. CPU time is that of this process.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from benchmarks import record
from pagewire.bench.serve.answer import Answer
from pagewire.bench.serve.generator import new_client
from pagewire.bench.serve.grpc_client import take
from pagewire.bench.serve.http_wire import EventSplitter, ResponseDecoder
from pagewire.bench.serve.openai_events import EventReader
from pagewire.bench.serve.target import Target
from pagewire.inference.v1 import inference_pb2 as pb
from tools.service import Service

STREAMS, TOKENS, STEP_MS, ROUNDS = 128, 100, 25, 3
PARSED = 100_000
PROMPT = list(range(100, 116))

Exchange = Callable[[], Awaitable[int]]


def parse_http() -> dict[str, float]:
    """Events of a completion, each a chunk and a piece of its own."""
    event = {
        "id": "cmpl-0123456789abcdef0123456789abcdef",
        "object": "text_completion",
        "created": 1_790_000_000,
        "model": "smollm2-135m",
        "choices": [{"index": 0, "text": " token", "logprobs": None, "finish_reason": None}],
    }
    data = f"data: {json.dumps(event)}\n\n".encode()
    piece = b"%x\r\n%s\r\n" % (len(data), data)
    decoder, splitter, answer = ResponseDecoder(), EventSplitter(), Answer(0, 1, PARSED)
    reader = EventReader(answer, chat=False)
    decoder.feed(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    began = time.process_time()
    for _ in range(PARSED):
        now = time.perf_counter()
        reader.read(splitter.feed(decoder.feed(piece)), now)
    seconds = time.process_time() - began
    assert len(answer.times) == PARSED
    return _parsed(seconds, len(piece))


def parse_grpc() -> dict[str, float]:
    """Events of Generate, each a message and a piece of its own."""
    delta = pb.Delta(
        token_ids=[12_345], text=" token", usage=pb.Usage(prompt_tokens=16, completion_tokens=50)
    )
    message = pb.GenerateResponse(
        request_id="0123456789abcdef0123456789abcdef", delta=delta
    ).SerializeToString()
    answer = Answer(0, 1, PARSED)
    began = time.process_time()
    for _ in range(PARSED):
        take(answer, pb.GenerateResponse.FromString(message), time.perf_counter())
    seconds = time.process_time() - began
    assert len(answer.times) == PARSED
    return _parsed(seconds, len(message))


def _parsed(seconds: float, size: int) -> dict[str, float]:
    return {
        "us_per_token": round(seconds / PARSED * 1e6, 2),
        "bytes_per_token": size,
        "mb_per_s": round(size * PARSED / seconds / 1e6, 1),
    }


async def cpu_per_token(exchange: Exchange) -> dict[str, float]:
    """All streams at once; an exchange returns how many pieces of output it saw."""
    began, cpu_began = time.perf_counter(), time.process_time()
    pieces = sum(await asyncio.gather(*(exchange() for _ in range(STREAMS))))
    cpu, wall = time.process_time() - cpu_began, time.perf_counter() - began
    return {"us_per_token": cpu / pieces * 1e6, "pieces": pieces, "pieces_per_s": pieces / wall}


async def ours(url: str, model: str) -> dict[str, float]:
    """The client of `pagewire bench serve`."""
    client = new_client(Target(url=url, model=model))
    await client.prepare(STREAMS)
    request = client.request(PROMPT, TOKENS)

    async def exchange() -> int:
        answer = Answer(0, len(PROMPT), TOKENS)
        await client.send(request, answer)
        assert answer.is_complete, answer.error
        return len(answer.times)

    result = await cpu_per_token(exchange)
    await client.close()
    return result


async def with_aiohttp(url: str, model: str) -> dict[str, float]:
    """Lines of the stream, each decoded."""
    body = Target(url=url, model=model).body(PROMPT, TOKENS)
    headers = {"content-type": "application/json"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def exchange() -> int:
            times = []
            async with session.post(f"{url}/v1/completions", data=body, headers=headers) as response:
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        event = json.loads(line[6:])
                        if event["choices"] and event["choices"][0]["finish_reason"] is None:
                            times.append(time.perf_counter())
            return len(times)

        return await cpu_per_token(exchange)


async def measure(service: Service) -> dict[str, Any]:
    """Every client in turn, several times over; medians."""
    clients: dict[str, Callable[[], Awaitable[dict[str, float]]]] = {
        "HTTP, ours": lambda: ours(service.http_url, service.model),
        "HTTP, aiohttp and json": lambda: with_aiohttp(service.http_url, service.model),
        "gRPC, ours": lambda: ours(f"grpc://{service.grpc_target}", service.model),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in clients}
    for _ in range(ROUNDS):
        for name, client in clients.items():
            runs[name].append(await client())
    return {
        name: {
            "us_per_token": round(statistics.median(run["us_per_token"] for run in each), 1),
            "all_us_per_token": [round(run["us_per_token"], 1) for run in each],
            "pieces": each[0]["pieces"],
            "pieces_per_s": round(statistics.median(run["pieces_per_s"] for run in each)),
        }
        for name, each in runs.items()
    }


async def measure_all(service: Service) -> dict[str, Any]:
    """Parsing, then clients."""
    return {
        "parsing": {"HTTP": parse_http(), "gRPC": parse_grpc()},
        f"{STREAMS} streams x {TOKENS} tokens, a step every {STEP_MS} ms": await measure(service),
    }


def main() -> None:
    """Measures and reports."""
    arguments = record.parser(__doc__).parse_args()
    options = ("--engine", "null", "--null-step-ms", str(STEP_MS))
    with tempfile.TemporaryDirectory() as directory, Service(Path(directory), options=options) as service:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            results = runner.run(measure_all(service))
    record.write(arguments.json, results)


if __name__ == "__main__":
    main()
