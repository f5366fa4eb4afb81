"""How many processes the load generator has, and what passes between them."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from array import array

import pytest
import uvloop

from pagewire.bench.serve import generator
from pagewire.bench.serve.answer import Answer
from pagewire.bench.serve.datasets import RandomDataset
from pagewire.bench.serve.load import Load
from pagewire.bench.serve.prompts import PromptMaker
from pagewire.bench.serve.share import Point
from pagewire.bench.serve.target import Target
from pagewire.bench.workloads import Lengths

MANY = 1_000_000


@pytest.mark.parametrize(
    ("url", "load", "expected"),
    [
        ("http://h", Load(num_requests=10_000), 1),
        ("grpc://h", Load(num_requests=64), 1),
        ("grpc://h", Load(num_requests=65), 2),
        ("grpc://h", Load(num_requests=10_000), 8),
        ("grpc://h", Load(concurrency=130, num_requests=10_000), 3),
        ("grpc://h", Load(rate=8, num_requests=10_000), 1),
        ("grpc://h", Load(rate=50, duration=9), 4),
        ("grpc://h", Load(rate=1000, concurrency=70, duration=9), 2),
    ],
)
def test_over_grpc_a_load_has_as_many_processes_as_it_takes_and_there_are_cores_for(
    monkeypatch: pytest.MonkeyPatch, url: str, load: Load, expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert generator.suitable_processes(Target(url=url), [Load(num_requests=1), load]) == expected


class InstantClient:
    """Has every answer at once, in many pieces."""

    async def prepare(self, connections: int) -> None:
        pass

    def request(self, prompt: list[int] | str, max_tokens: int) -> bytes:
        return b""

    async def send(self, request: bytes, answer: Answer) -> None:
        answer.times = array("d", [1.0]) * MANY

    async def close(self) -> None:
        pass


def test_answers_that_are_larger_than_a_pipe_reach_a_parent_that_reads_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generator, "new_client", lambda target: InstantClient())
    ours, theirs = multiprocessing.Pipe()

    def child() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(generator._serve_parent(theirs, Target(url="http://h")))
        theirs.close()

    thread = threading.Thread(target=child)
    thread.start()
    dataset = RandomDataset(maker=PromptMaker(), input=Lengths(1, 1), output=Lengths(1, 1))
    ours.send(("prepare", Point(run="run", load=Load(num_requests=1), dataset=dataset)))
    assert ours.recv() is None
    ours.send(("begin", time.perf_counter()))
    time.sleep(0.5)
    [answer], health = ours.recv()
    assert len(answer.times) == MANY
    assert health.wall_seconds > 0
    ours.close()
    thread.join(10)
    assert not thread.is_alive()
