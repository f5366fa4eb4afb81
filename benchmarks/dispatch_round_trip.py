"""Round trip of a step through dispatch: scheduler -> shared memory -> worker -> shared memory -> scheduler.

The worker process is real dispatch with a null engine: it answers every plan at once. An empty plan measures
the path itself; a plan of 256 decoding requests, what encoding and decoding a full step adds. The floor is a
bare ping-pong of two eventfds between two processes.

Waking a core that has gone to sleep can cost more than everything else, above all on a virtual machine, and
a worker with steps to compute does not sleep. So all is measured twice: with the cores as they are, and kept
awake by loops of the lowest priority (SCHED_IDLE), which take no time from anything else.
"""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks import record
from engine.dispatch.control import SchedulerGone, WorkerEndpoint
from engine.dispatch.facts import WorkerFacts
from engine.dispatch.limits import EngineLimits
from engine.dispatch.link import WorkerLink
from engine.dispatch.records import StepPlan, StepResult
from engine.dispatch.sampling import U32Array, u32
from pagewire.bench.percentiles import percentile

WARM_UP, ROUNDS = 500, 20_000
FACTS = WorkerFacts(
    model="null",
    limits=EngineLimits(
        vocab_size=50_000,
        max_model_len=8192,
        block_size=16,
        num_blocks=1 << 16,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        hidden_size=64,
    ),
    eos_token_ids=(0,),
    dtype="none",
    device="none",
)


def null_worker(path: Path) -> None:
    """Answers plans with as many zeros as they sample, until the scheduler leaves."""
    endpoint = WorkerEndpoint(path)
    print("listening", flush=True)
    session = endpoint.accept(FACTS)
    try:
        while (plan := session.next_plan(block=True)) is not None:
            session.send_result(StepResult(plan.step_id, np.zeros(int(plan.samples.sum()), np.uint32)))
    except SchedulerGone:
        endpoint.close()


def decode_plan_of(num_requests: int, step_id: int) -> StepPlan:
    """A step in which every request computes one token; every sixteenth takes a new block."""
    rows: U32Array = np.arange(num_requests, dtype=np.uint32)
    ones = np.ones(num_requests, np.uint32)
    takes_block = (rows % 16 == step_id % 16).astype(np.uint32)
    blocks: U32Array = np.arange(int(takes_block.sum()), dtype=np.uint32)
    return StepPlan(step_id, u32([]), [], rows, rows + step_id, ones, ones, takes_block, blocks)


def floor() -> list[float]:
    """Round trips of two bare eventfds between this process and a child, waiting in poll(2)."""
    there, back = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
    child = os.fork()
    if child == 0:
        _answer(there, back, WARM_UP + ROUNDS)
        os._exit(0)
    poll = select.poll()
    poll.register(back, select.POLLIN)
    seconds = []
    for _ in range(WARM_UP + ROUNDS):
        began = time.perf_counter()
        os.eventfd_write(there, 1)
        poll.poll()
        os.eventfd_read(back)
        seconds.append(time.perf_counter() - began)
    os.waitpid(child, 0)
    os.close(there)
    os.close(back)
    return seconds[WARM_UP:]


def _answer(there: int, back: int, rounds: int) -> None:
    poll = select.poll()
    poll.register(there, select.POLLIN)
    for _ in range(rounds):
        poll.poll()
        os.eventfd_read(there)
        os.eventfd_write(back, 1)


@contextmanager
def cores_awake() -> Iterator[None]:
    """Keeps every core out of its sleep states by a loop that yields to anything else."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    for loop in loops:
        os.sched_setscheduler(loop.pid, os.SCHED_IDLE, os.sched_param(0))
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def blocking(link: WorkerLink, num_requests: int, first_step: int) -> list[float]:
    """Round trips as the offline engine makes them: wait in poll(2)."""
    seconds = []
    for step_id in range(first_step, first_step + WARM_UP + ROUNDS):
        plan = decode_plan_of(num_requests, step_id)
        began = time.perf_counter()
        link.send_plan(plan)
        while link.wait_result() is None:
            pass
        seconds.append(time.perf_counter() - began)
    return seconds[WARM_UP:]


async def on_the_loop(link: WorkerLink, num_requests: int, first_step: int) -> list[float]:
    """Round trips as the scheduler makes them: the eventfd is a reader of the uvloop event loop."""
    loop = asyncio.get_running_loop()
    seconds: list[float] = []
    done = loop.create_future()
    step_id, began = first_step, 0.0

    def send() -> None:
        nonlocal began
        plan = decode_plan_of(num_requests, step_id)
        began = time.perf_counter()
        link.send_plan(plan)

    def receive() -> None:
        nonlocal step_id
        link.clear()
        while link.poll_result() is not None:
            seconds.append(time.perf_counter() - began)
            step_id += 1
            if len(seconds) == WARM_UP + ROUNDS:
                done.set_result(None)
            else:
                send()

    loop.add_reader(link.result_fd, receive)
    send()
    await done
    loop.remove_reader(link.result_fd)
    return seconds[WARM_UP:]


def summary(seconds: list[float]) -> dict[str, float]:
    """Microseconds."""
    return {
        "p50_us": round(percentile(seconds, 50) * 1e6, 1),
        "p99_us": round(percentile(seconds, 99) * 1e6, 1),
        "mean_us": round(sum(seconds) / len(seconds) * 1e6, 1),
    }


def rows(link: WorkerLink, first_step: int) -> tuple[dict[str, Any], int]:
    """One table, and the number of the next step."""
    table: dict[str, Any] = {"bare eventfds": summary(floor())}
    for num_requests in (0, 256):
        table[f"blocking, {num_requests} requests"] = summary(blocking(link, num_requests, first_step))
        first_step += WARM_UP + ROUNDS
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            seconds = runner.run(on_the_loop(link, num_requests, first_step))
        table[f"uvloop, {num_requests} requests"] = summary(seconds)
        first_step += WARM_UP + ROUNDS
    return table, first_step


def main() -> None:
    """Measures and reports."""
    arguments = record.parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "worker.sock"
        code = f"import pathlib, {__spec__.name} as b; b.null_worker(pathlib.Path({str(path)!r}))"
        worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert worker.stdout is not None
        worker.stdout.readline()
        link = WorkerLink.connect(path)
        as_they_are, next_step = rows(link, 0)
        with cores_awake():
            awake, _ = rows(link, next_step)
        link.close()
        worker.wait(10)
        worker.stdout.close()
    results = {"rounds": ROUNDS, "cores awake": awake, "cores as they are": as_they_are}
    record.write(arguments.json, results)


if __name__ == "__main__":
    main()
