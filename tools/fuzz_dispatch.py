"""Mutated bytes where processes read each other's: ring records, rings' own words, and protobuf messages.

python -m tools.fuzz_dispatch --records 1000000 --messages 100000 [--seed 1] [--json out.json]

Plans are decoded and applied to a worker's rows, results decoded and applied to a scheduler, rings read with
spoilt cursors and lengths, in this process: each must be taken or refused with the error that its reader
knows. Messages go to a real service, to its public API and to its scheduler's stream. Status 1 if there was a
fault: another exception, a write outside of the rows, more than a second for a record or ten for a message,
INTERNAL for a message that could be parsed, a process that died.
"""

from __future__ import annotations

import asyncio
import os
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks import record
from engine.attention.interface import IntArray
from engine.dispatch.facts import WorkerFacts
from engine.dispatch.limits import EngineLimits
from engine.dispatch.records import (
    PromptLogprobs,
    StepResult,
    TokenLogprobs,
    decode_plan,
    decode_result,
    encode_plan,
    encode_result,
)
from engine.dispatch.ring import Ring, RingError, RingReader, RingShape, RingWriter
from engine.dispatch.sampling import Pooling, RecordError, u32
from engine.step.row_ledger import PlanError, RowLedger
from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.scheduler.v1 import scheduler_pb2
from pagewire.wire.sampling_messages import to_message
from pagewire.wire.sampling_params import SamplingParams
from scheduler.core import Scheduler
from scheduler.serve.intake import make_request
from scheduler.settings import CoreSettings
from tools.fuzz_service import harm, process_ids, start_service

ROWS, VOCAB, MODEL_LEN, BLOCK, POOL, BUDGET = 4, 50, 64, 4, 40, 32
WORDS = (0, 1, 2, 3, 7, 31, 63, 64, 65, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)
SLOWEST_SECONDS, MESSAGE_SECONDS = 1.0, 10.0
MESSAGES_AT_ONCE = 16
FACTS = WorkerFacts(
    model="none",
    limits=EngineLimits(
        vocab_size=VOCAB,
        max_model_len=MODEL_LEN,
        block_size=BLOCK,
        num_blocks=POOL,
        max_num_seqs=ROWS,
        max_num_batched_tokens=BUDGET,
        hidden_size=8,
    ),
    eos_token_ids=(2,),
    dtype="float32",
    device="none",
)


class GuardedRows(RowLedger):
    """Rows that fail if anything is written outside of them."""

    def _write_tokens(self, row: int, token_ids: np.ndarray) -> None:
        if not (0 <= row < ROWS and len(token_ids) <= MODEL_LEN and token_ids.max(initial=0) < VOCAB):
            raise AssertionError(f"{len(token_ids)} tokens written to row {row}")

    def _write_prediction(self, row: int, token_ids: np.ndarray, num_prompt_tokens: int) -> None:
        if not (0 <= row < ROWS and len(token_ids) <= self.limits.max_prediction):
            raise AssertionError(f"a prediction of {len(token_ids)} tokens written to row {row}")

    def _locate_decodes(self, rows: IntArray, starts: IntArray) -> IntArray:
        if not ((rows >= 0) & (rows < ROWS)).all():
            raise AssertionError(f"rows {rows} decode")
        return starts

    def _write_blocks(self, group: int, rows: IntArray, columns: IntArray, block_ids: np.ndarray) -> None:
        inside = (
            (group == 0) & (rows >= 0) & (rows < ROWS) & (columns >= 0) & (columns < self.limits.max_blocks)
        )
        if not (inside.all() and (block_ids < POOL).all() and len(rows) == len(columns) == len(block_ids)):
            raise AssertionError(f"blocks {block_ids} written to rows {rows}, columns {columns}")


def mutate(data: bytes, generator: random.Random) -> bytes:
    """Some bits flipped, words replaced, parts cut out, doubled or added."""
    changed = bytearray(data)
    for _ in range(generator.choice((1, 1, 1, 2, 4))):
        kind, place = generator.randrange(6), generator.randrange(len(changed) + 1)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << generator.randrange(8)
        elif kind == 1 and place < len(changed):
            changed[place] = generator.randrange(256)
        elif kind in (2, 3) and place // 4 * 4 + 4 <= len(changed):
            struct.pack_into("<I", changed, place // 4 * 4, generator.choice(WORDS))
        elif kind == 4:
            del changed[place : place + generator.choice((1, 4, 8, len(changed)))]
        else:
            changed[place:place] = changed[: generator.choice((1, 4, 16))]
    return bytes(changed)


def prompt_of(number: int) -> list[int]:
    """The prompt of a request of `busy_scheduler`."""
    return [(7 * number + place) % VOCAB for place in range(5 + number)]


def busy_scheduler() -> Scheduler:
    """A scheduler with requests of all kinds; the next plans are theirs."""
    scheduler = Scheduler(FACTS.limits, CoreSettings(max_num_waiting=16))
    for number in range(ROWS):
        sampling = SamplingParams(
            temperature=0.5,
            logprobs=2 if number == 1 else None,
            prompt_logprobs=1 if number == 2 else None,
            logit_bias={3: 1.0},
            max_tokens=20,
            seed=number,
        )
        pooling = Pooling.MEAN if number == 3 else Pooling.NONE
        prompt = prompt_of(number)
        bad_words = [[1, 2]] if number == 0 else []
        scheduler.add(
            make_request(str(number), prompt, sampling, FACTS, bad_words=bad_words, pooling=pooling)
        )
    return scheduler


def result_record() -> bytes:
    """What a worker answers the first plan of `busy_scheduler`."""
    prompt = PromptLogprobs(
        2, 1, np.zeros(6, np.float32), np.zeros((6, 1), np.uint32), np.zeros((6, 1), "<f4")
    )
    result = StepResult(
        step_id=0,
        token_ids=u32([5, 6, 7]),
        logprobs={1: TokenLogprobs(-1.0, [1, 2], [-1.0, -2.0])},
        prompt_logprobs=[prompt],
        pooled={3: np.zeros(8, np.float32)},
    )
    return encode_result(result)


class PlanTarget:
    """A worker's decoding and checking of plans."""

    def __init__(self) -> None:
        scheduler = busy_scheduler()
        first = scheduler.schedule()
        scheduler.update(decode_result(result_record()))
        scheduler.add(make_request("the same", prompt_of(1), SamplingParams(max_tokens=2), FACTS))
        second = scheduler.schedule()
        assert first is not None
        assert second is not None
        assert len(second.copied_blocks) == 1
        self.samples = [encode_plan(first), encode_plan(second)]
        self._rows = GuardedRows(FACTS.limits)

    def take(self, data: bytes) -> None:
        try:
            plan = decode_plan(data)
            self._rows.reset()
            self._rows.apply(plan)
            self._rows.check_schedule(plan)
        except (RecordError, PlanError):
            raise Refused from None
        if (plan.copied_blocks >= POOL).any():
            raise AssertionError(f"blocks {plan.copied_blocks} copied")


class ResultTarget:
    """A scheduler's decoding and applying of results."""

    def __init__(self) -> None:
        self.samples = [result_record()]

    def take(self, data: bytes) -> None:
        try:
            result = decode_result(data)
        except RecordError:
            raise Refused from None
        scheduler = busy_scheduler()
        plan = scheduler.schedule()
        assert plan is not None
        try:
            scheduler.update(result)
        except ValueError:
            raise Refused from None
        scheduler.schedule()


class RingTarget:
    """A reader of a ring whose words and lengths are spoilt."""

    def __init__(self) -> None:
        self._ring = Ring.create(RingShape(slot_bytes=64, num_slots=4))
        self._ring.unlink()
        writer = RingWriter(self._ring)
        for number in range(3):
            writer.write(bytes([number]) * (20 * number))
        size = self._ring.shape.segment_bytes
        self.samples = [bytes(self._ring._bytes[:size])]

    def take(self, data: bytes) -> None:
        size = self._ring.shape.segment_bytes
        self._ring._bytes[:size] = data[:size].ljust(size, b"\0")
        try:
            reader = RingReader(self._ring)
            for _ in range(8):
                if reader.read() is None:
                    return
        except RingError:
            raise Refused from None


class Refused(Exception):
    """The reader said no, as it should."""


Target = PlanTarget | ResultTarget | RingTarget


def fuzz(target: Target, count: int, generator: random.Random) -> Counter[str]:
    """Gives a target mutated samples, and counts what it did."""
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        data = mutate(generator.choice(target.samples), generator)
        began = time.perf_counter()
        try:
            target.take(data)
            outcomes["taken"] += 1
        except Refused:
            outcomes["refused"] += 1
        except Exception as error:
            outcomes[f"fault: {type(error).__name__}: {error}"[:160]] += 1
            if outcomes.total() - outcomes["taken"] - outcomes["refused"] <= 3:
                print(f"{type(target).__name__}: {error!r} of {data.hex()}", file=sys.stderr)
        if time.perf_counter() - began > SLOWEST_SECONDS:
            outcomes["fault: slow"] += 1
    return outcomes


def requests() -> list[bytes]:
    """Public requests of several kinds, serialized."""
    sampling = pb.SamplingParams(
        temperature=0.7, top_k=5, seed=3, max_tokens=4, stop=["x"], logit_bias={3: 1.0}
    )
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hello")])
    messages = (
        pb.GenerateRequest(text="some text", sampling=sampling, request_id="fuzz", cache_salt="salt"),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=range(9)), sampling=sampling, echo=True),
        pb.GenerateRequest(messages=chat, sampling=sampling, timeout=5.0),
    )
    return [message.SerializeToString() for message in messages]


def submissions() -> list[bytes]:
    """A frontend's messages to its scheduler, serialized."""
    sampling = to_message(SamplingParams(temperature=0.7, seed=3, max_tokens=4, stop_token_ids=[4]))
    submit = scheduler_pb2.Submit(
        handle=1,
        request_id="fuzz",
        token_ids=range(20),
        sampling=sampling,
        bad_words=[pb.TokenIds(ids=[1, 2])],
        cache_salt="salt",
        client="somebody",
        timeout=5.0,
    )
    abort = scheduler_pb2.Abort(handle=1)
    messages = (scheduler_pb2.ConnectRequest(submit=submit), scheduler_pb2.ConnectRequest(abort=abort))
    return [message.SerializeToString() for message in messages]


async def send_all(service: Any, scheduler: str, count: int, generator: random.Random) -> Counter[str]:
    """Sends mutated messages to the service, and counts the statuses that came back."""
    outcomes: Counter[str] = Counter()
    async with (
        grpc.aio.insecure_channel(service.grpc_target) as public,
        grpc.aio.insecure_channel(scheduler) as internal,
    ):
        generate = public.unary_unary("/pagewire.inference.v1.InferenceService/GenerateOnce")
        connect = internal.stream_stream("/pagewire.scheduler.v1.SchedulerService/Connect")

        async def ask(data: bytes) -> None:
            await generate(data, timeout=MESSAGE_SECONDS)

        async def submit(data: bytes) -> None:
            call = connect(timeout=MESSAGE_SECONDS)
            await call.write(data)
            await call.done_writing()
            async for _ in call:
                pass

        async def send(kind: Any, data: bytes) -> None:
            try:
                await kind(data)
                outcomes[f"{kind.__name__}: OK"] += 1
            except grpc.aio.AioRpcError as error:
                internal_error = error.code() is grpc.StatusCode.INTERNAL
                unparsed = "deserializing" in (error.details() or "")
                own = (error.details() or "").startswith("the request's deadline")
                late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not own
                fault = "fault: " if late or (internal_error and not unparsed) else ""
                outcomes[f"{fault}{kind.__name__}: {error.code().name}"] += 1
                if fault:
                    print(f"{kind.__name__}: {error.details()} of {data.hex()}", file=sys.stderr)

        public_samples, internal_samples = requests(), submissions()
        for _ in range(count // MESSAGES_AT_ONCE):
            batch = []
            for number in range(MESSAGES_AT_ONCE):
                kind, samples = (ask, public_samples) if number % 2 else (submit, internal_samples)
                batch.append(send(kind, mutate(generator.choice(samples), generator)))
            await asyncio.gather(*batch)
    return outcomes


def fuzz_messages(count: int, generator: random.Random) -> Counter[str]:
    """Mutated messages to a service without a model."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # nosec B108 # a short path, of a name of its own
        runtime = Path(name, "run")
        runtime.mkdir()
        os.environ["XDG_RUNTIME_DIR"] = str(runtime)
        service = start_service(Path(name), "--engine", "null")
        try:
            before = process_ids(service)
            (socket,) = runtime.glob("pagewire-*/scheduler.sock")
            outcomes = asyncio.run(send_all(service, f"unix:{socket}", count, generator))
            outcomes.update(f"fault: {each}" for each in harm(service, before))
        finally:
            service.stop()
    return outcomes


def main() -> int:
    """The exit status: 0 if there was no fault."""
    parser = record.parser(__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    results: dict[str, Any] = {}
    for target, share in ((PlanTarget(), 0.7), (ResultTarget(), 0.2), (RingTarget(), 0.1)):
        began = time.monotonic()
        outcomes = fuzz(target, int(arguments.records * share), generator)
        results[type(target).__name__] = {**outcomes, "seconds": round(time.monotonic() - began)}
    if arguments.messages:
        results["messages"] = dict(fuzz_messages(arguments.messages, generator))
    record.write(arguments.json, results)
    return 1 if any("fault" in outcome for each in results.values() for outcome in each) else 0


if __name__ == "__main__":
    sys.exit(main())
