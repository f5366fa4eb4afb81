"""One client that asks for a thousand answers at once, in a process of its own.

python -m benchmarks.flood localhost:50051 --requests 1000 --prompt 50 250 --answer 100 900

It asks for whole answers, not for streams, says "sent" when the requests are on their way, and waits for
their answers until its standard input ends; then it says how many were still missing, and drops them. A
client measured beside it in the same process would wait for this one's answers to be read, and not only for
the server.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys

import grpc

from benchmarks.requests import greedy, prompt
from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc

SEED = 20
SALT = 10_000
USER = "flood"
SENDING_SECONDS = 0.5


def lengths(count: int, prompts: tuple[int, int], answers: tuple[int, int]) -> list[tuple[int, int]]:
    """Tokens of each request's prompt and answer."""
    rng = random.Random(SEED)
    return [(rng.randint(*prompts), rng.randint(*answers)) for _ in range(count)]


def requests(sizes: list[tuple[int, int]]) -> list[pb.GenerateRequest]:
    """The requests; no two prompts begin alike."""
    return [
        greedy(prompt(length, SALT + index), answer, user=USER)
        for index, (length, answer) in enumerate(sizes)
    ]


async def flood(target: str, sizes: list[tuple[int, int]]) -> None:
    """Sends them all and waits for the end of standard input."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        await channel.channel_ready()
        calls = [stub.GenerateOnce(request) for request in requests(sizes)]
        await asyncio.sleep(SENDING_SECONDS)
        print("sent", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        print(sum(not call.done() for call in calls), flush=True)
        for call in calls:
            call.cancel()


def main() -> None:
    """Floods one server."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--prompt", type=int, nargs=2, required=True)
    parser.add_argument("--answer", type=int, nargs=2, required=True)
    arguments = parser.parse_args()
    sizes = lengths(arguments.requests, tuple(arguments.prompt), tuple(arguments.answer))
    asyncio.run(flood(arguments.target, sizes))


if __name__ == "__main__":
    main()
