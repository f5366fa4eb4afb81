"""What a step costs the scheduler's processor, without an engine: microseconds per step, part by part.

The real core, driver, outbox and dispatch records, and the real offline API, run against a null worker in the
same process and thread: it decodes each plan and makes up as many tokens as the plan samples. What it does
is measured too, as `worker.*`, but not counted in the total. A step's total is everything from its result
in the ring to the next plan in the ring and the serialized StepDeltas message, with the submission of the
requests that replace finished ones. gRPC's own work on that message is not in it.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import uvloop

from benchmarks import record
from engine.config import WorkerConfig
from engine.dispatch import control, link
from engine.dispatch.control import WorkerEndpoint, WorkerSession
from engine.dispatch.facts import WorkerFacts
from engine.dispatch.limits import EngineLimits
from engine.dispatch.link import WorkerLink
from engine.dispatch.records import StepResult
from pagewire.bench.percentiles import percentile
from pagewire.inference.v1 import inference_pb2
from pagewire.offline.engine import OfflineEngine
from pagewire.offline.llm import LLM
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from pagewire.wire.sampling_params import SamplingParams
from scheduler.config import SchedulerConfig
from scheduler.core import Scheduler
from scheduler.serve.driver import EngineDriver
from scheduler.serve.outbox import Outbox
from scheduler.serve.service import Connection
from scheduler.settings import CoreSettings

VOCAB = 49_152
FACTS = WorkerFacts(
    model="null",
    limits=EngineLimits(
        vocab_size=VOCAB,
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
PARTS: tuple[tuple[object, str, str], ...] = (
    (Connection, "submit", "submit"),
    (Scheduler, "schedule", "schedule"),
    (link, "encode_plan", "encode_plan"),
    (WorkerLink, "send_plan", "send"),
    (WorkerLink, "poll_result", "poll"),
    (link, "decode_result", "decode_result"),
    (Scheduler, "update", "update"),
    (EngineDriver, "_hand_out", "hand_out"),
    (Outbox, "_take_deltas", "protobuf"),
    (control, "decode_plan", "worker.decode_plan"),
    (control, "encode_result", "worker.encode_result"),
)
Prompt = list[int]
Load = Iterator[tuple[Prompt, int]]


class Stopwatch:
    """Counts the time inside watched functions, less that of watched functions they call; step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches all PARTS."""
        with ExitStack() as patches:
            for owner, name, part in PARTS:
                timed = self.timed(part, getattr(owner, name))
                patches.enter_context(mock.patch.object(owner, name, timed))
            yield

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time counted as this part's."""

        @wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            self._inner.append(0.0)
            began = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                seconds = time.perf_counter() - began
                self._now[part] += seconds - self._inner.pop()
                self._inner[-1] += seconds

        return call

    def step_ends(self, total: float) -> None:
        """Closes a step that took this long, the worker's parts included."""
        worker = sum(seconds for part, seconds in self._now.items() if part.startswith("worker"))
        parts = {**self._now, "total": total - worker}
        parts["other"] = parts["total"] - sum(s for p, s in self._now.items() if not p.startswith("worker"))
        self.steps.append(parts)
        self._now.clear()

    def table(self, num_skipped: int = 0) -> dict[str, Any]:
        """Microseconds by part, over all steps but the first ones; and how long the first plan took."""
        steps = self.steps[num_skipped:]
        names = [part for _, _, part in PARTS] + ["other", "total"]
        columns = {name: [step.get(name, 0.0) * 1e6 for step in steps] for name in names}
        first = round(self.steps[0]["total"] * 1e3, 1)
        return {"steps": len(steps), "milliseconds_to_first_plan": first} | {
            name: {
                "p50_us": round(percentile(column, 50), 1),
                "p99_us": round(percentile(column, 99), 1),
                "mean_us": round(sum(column) / len(column), 1),
            }
            for name, column in columns.items()
            if any(column)
        }


class NullWorker:
    """The worker's end of dispatch, answering on demand."""

    def __init__(self, session: WorkerSession) -> None:
        self._session = session
        self._tokens = np.random.default_rng(1).integers(1, VOCAB, 1 << 20).astype(np.uint32)
        self._drawn = 0

    def answer(self) -> None:
        """Answers the next plan."""
        plan = self._session.next_plan(block=True)
        assert plan is not None
        count = int(plan.samples.sum())
        begin = self._drawn % (len(self._tokens) - count)
        self._drawn += count
        self._session.send_result(StepResult(plan.step_id, self._tokens[begin : begin + count]))


class Endpoint:
    """A socket whose first scheduler gets a NullWorker."""

    def __init__(self, directory: str) -> None:
        self.path = Path(directory) / "worker.sock"
        self._endpoint = WorkerEndpoint(self.path)
        self._sessions: list[WorkerSession] = []
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        self._sessions.append(self._endpoint.accept(FACTS))

    def worker(self) -> NullWorker:
        """The worker, once the scheduler has attached."""
        self._thread.join()
        self._endpoint.close()
        return NullWorker(self._sessions[0])


def uniform(prompt: int, output: int) -> Load:
    """Random prompts of one length."""
    draw = random.Random(0)
    while True:
        yield draw.choices(range(1, VOCAB), k=prompt), output


def varied() -> Load:
    """Prompts of 128 to 1024 tokens, outputs of 64 to 512: with 256 running, about one ends every step."""
    draw = random.Random(2)
    while True:
        yield draw.choices(range(1, VOCAB), k=draw.randrange(128, 1025)), draw.randrange(64, 513)


def shared_prefix(prefix: int, own: int, output: int) -> Load:
    """Prompts that begin alike."""
    draw = random.Random(5)
    common = draw.choices(range(1, VOCAB), k=prefix)
    while True:
        yield common + draw.choices(range(1, VOCAB), k=own), output


async def serving(load: Load, *, num_open: int, num_skipped: int, num_steps: int) -> dict[str, Any]:
    """Steps of the service with `num_open` requests open at all times, after `num_skipped` steps."""
    stopwatch = Stopwatch()
    with stopwatch.watching(), tempfile.TemporaryDirectory() as directory:
        endpoint = Endpoint(directory)
        driver = EngineDriver(
            SchedulerConfig(listen=("none",), worker_socket=endpoint.path, max_num_waiting=4096)
        )
        running = asyncio.create_task(driver.run())
        await driver.attached.wait()
        worker, connection = endpoint.worker(), Connection(driver)
        serialize = stopwatch.timed("protobuf", pb.ConnectResponse.SerializeToString)
        submissions = [submission(handle, next(load)) for handle in range(num_open + 2 * num_steps)]
        began = time.perf_counter()
        for _ in range(num_open):
            connection.submit(submissions.pop())
        await asyncio.sleep(0)  # planning begins when all have been submitted
        worker.answer()
        stopwatch.step_ends(time.perf_counter() - began)
        for _ in range(num_skipped + num_steps):
            began = time.perf_counter()
            num_ended = await one_step(connection.outbox, serialize)
            for _ in range(min(num_ended, len(submissions))):
                connection.submit(submissions.pop())
            worker.answer()
            stopwatch.step_ends(time.perf_counter() - began)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return stopwatch.table(1 + num_skipped)


async def one_step(outbox: Outbox, serialize: Callable[[pb.ConnectResponse], bytes]) -> int:
    """Takes and serializes what the next step has to say, as the stream's writer does; how many ended."""
    num_ended = num_tokens = 0
    while not num_tokens:
        for message in await outbox.take():
            serialize(message)
            num_tokens += len(message.deltas.token_ids)
            num_ended += len(message.deltas.ended)
    return num_ended


def submission(handle: int, request: tuple[Prompt, int]) -> pb.Submit:
    """As a frontend sends it."""
    prompt, max_tokens = request
    sampling = inference_pb2.SamplingParams(max_tokens=max_tokens, temperature=0.7, seed=handle, top_p=0.9)
    return pb.Submit(handle=handle, request_id=f"request-{handle}", token_ids=prompt, sampling=sampling)


class LoopbackEngine(OfflineEngine):
    """The offline engine over a worker in this process that answers whenever it is waited for."""

    def __init__(self, worker: WorkerConfig, *, settings: CoreSettings, step_timeout: float) -> None:
        with tempfile.TemporaryDirectory() as directory:
            endpoint = Endpoint(directory)
            link = LoopbackLink.connect(endpoint.path)
            link.worker = endpoint.worker()
        self._attach(link, settings)

    def close(self) -> None:
        self._masks.close()
        self._link.close()


class LoopbackLink(WorkerLink):
    """A link that lets its worker answer, and ends the step, when it is waited for."""

    worker: NullWorker
    step_ends: Callable[[], None]

    def wait_result(self, timeout: float | None = None) -> StepResult | None:
        self.step_ends()
        self.worker.answer()
        return super().wait_result(timeout)


def offline(load: Load, num_requests: int) -> dict[str, Any]:
    """Steps of `LLM.generate`, and the seconds of the whole call by where they went."""
    stopwatch, last = Stopwatch(), 0.0

    def step_ends() -> None:
        nonlocal last
        now = time.perf_counter()
        stopwatch.step_ends(now - last)
        last = now

    jobs = [next(load) for _ in range(num_requests)]
    params = [SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True) for _, max_tokens in jobs]
    with stopwatch.watching(), mock.patch("pagewire.offline.llm.OfflineEngine", LoopbackEngine), LLM() as llm:
        link = llm._engine._link  # type: ignore[union-attr]
        assert isinstance(link, LoopbackLink)
        link.step_ends = step_ends
        last = time.perf_counter()
        outputs = llm.generate([prompt for prompt, _ in jobs], params)
        ended = time.perf_counter()
    assert [len(output.outputs[0].token_ids) for output in outputs] == [count for _, count in jobs]
    return stopwatch.table(1) | {
        "milliseconds_from_last_result": round((ended - last) * 1e3, 1),
        "milliseconds_in_all": round((sum(s["total"] for s in stopwatch.steps) + ended - last) * 1e3),
    }


def main() -> None:
    """Measures and reports."""
    arguments = record.parser(__doc__).parse_args()

    def serve(load: Load, **numbers: int) -> dict[str, Any]:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(serving(load, **numbers))

    results = {
        "served: 1 request": serve(uniform(128, 8000), num_open=1, num_skipped=100, num_steps=5000),
        "served: 256 decoding": serve(uniform(128, 512), num_open=256, num_skipped=20, num_steps=480),
        "served: 256 running, 1 replaced a step": serve(
            varied(), num_open=264, num_skipped=600, num_steps=2000
        ),
        "served: the same with 2000 waiting": serve(varied(), num_open=2256, num_skipped=600, num_steps=2000),
        "served: 256 sharing 2048 tokens": serve(
            shared_prefix(2048, 64, 64), num_open=256, num_skipped=0, num_steps=60
        ),
        "offline: 256 x 128/512 (W1)": offline(uniform(128, 512), 256),
        "offline: 512 varied (W2)": offline(varied(), 512),
        "offline: 256 x (2048 shared + 64)/64 (W5)": offline(shared_prefix(2048, 64, 64), 256),
    }
    record.write(arguments.json, results)


if __name__ == "__main__":
    main()
