"""Requests with constraints, through the service: a miniature worker, real masks, real threads."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from tokenizers import Tokenizer, decoders, models

from pagewire.inference.v1 import inference_pb2
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from pagewire.scheduler.v1 import scheduler_pb2_grpc
from pagewire.structured.grammars import Mask, Matcher
from pagewire.structured.vocabulary import Vocabulary
from tests.unit.scheduler.executor import continuation
from tests.unit.scheduler.test_service import (
    FACTS,
    VOCAB,
    Frontend,
    WorkerThread,
    served,
    submit,
    used_blocks,
)

ALPHABET = 'abcdefghijklmnopqrstuvwxyz0123456789{}[]:,"-.'
PATTERN = "[a-f]{3}(-[0-9]{2}){4}"


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerThread]:
    vocab = {letter: index for index, letter in enumerate(ALPHABET)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    worker = WorkerThread(tmp_path / "worker.sock", replace(FACTS, model=str(tmp_path)))
    yield worker
    worker.close()


@pytest.fixture
async def stub(
    worker: WorkerThread, tmp_path: Path
) -> AsyncIterator[scheduler_pb2_grpc.SchedulerServiceStub]:
    async with served(tmp_path) as stub:
        yield stub


def constrained(
    handle: int,
    prompt: list[int],
    *,
    max_tokens: int = 60,
    min_tokens: int = 0,
    pattern: str = PATTERN,
    **fields: object,
) -> pb.ConnectRequest:
    structured = inference_pb2.StructuredOutput(regex=pattern)
    sampling = inference_pb2.SamplingParams(
        max_tokens=max_tokens, min_tokens=min_tokens, structured_output=structured
    )
    return pb.ConnectRequest(
        submit=pb.Submit(handle=handle, token_ids=prompt, sampling=sampling, **fields)  # type: ignore[arg-type]
    )


def text(tokens: list[int]) -> str:
    return "".join(ALPHABET[token] for token in tokens)


async def test_the_output_keeps_to_its_constraint_and_ends_with_it(
    stub: scheduler_pb2_grpc.SchedulerServiceStub,
) -> None:
    frontend = Frontend(stub)
    for handle in (1, 2, 3):
        await frontend.call.write(constrained(handle, [handle] * 9))
    await frontend.call.write(submit(4, [4], 30))
    await frontend.until_ended(1, 2, 3, 4)
    for handle in (1, 2, 3):
        assert re.fullmatch(PATTERN, text(frontend.tokens[handle]))
        assert frontend.ended[handle].reason == pb.END_REASON_STOP
        assert not frontend.ended[handle].HasField("stop_token_id")
    assert len({text(frontend.tokens[handle]) for handle in (1, 2, 3)}) == 3
    assert frontend.tokens[4] == continuation([4], 30, VOCAB)
    assert await used_blocks(stub) == 0


async def test_an_output_that_can_only_end_ends_before_min_tokens(
    stub: scheduler_pb2_grpc.SchedulerServiceStub,
) -> None:
    frontend = Frontend(stub)
    await frontend.call.write(constrained(1, [1] * 9, min_tokens=50))
    await frontend.until_ended(1)
    assert re.fullmatch(PATTERN, text(frontend.tokens[1]))
    assert frontend.ended[1].reason == pb.END_REASON_STOP


async def test_a_direct_client_may_constrain_its_output_too(
    stub: scheduler_pb2_grpc.SchedulerServiceStub,
) -> None:
    submission = constrained(0, [7, 7]).submit
    call = stub.Generate(pb.GenerateRequest(token_ids=[7, 7], sampling=submission.sampling))
    events = [event async for event in call]
    assert re.fullmatch(PATTERN, text([event.token.token_id for event in events[:-1]]))
    assert events[-1].ended.reason == pb.END_REASON_STOP


async def test_a_slow_matcher_delays_nobody_else(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished, real = threading.Event(), Matcher.mask

    def slow(matcher: Matcher) -> Mask | None:
        assert finished.wait(20)
        return real(matcher)

    monkeypatch.setattr(Matcher, "mask", slow)
    frontend = Frontend(stub)
    await frontend.call.write(constrained(1, [1] * 9))
    for handle in (2, 3):
        await frontend.call.write(submit(handle, [handle], 40))
    await frontend.until_ended(2, 3)
    assert 1 not in frontend.tokens
    await frontend.call.write(submit(4, [4], 40))
    await frontend.until_ended(4)
    assert 1 not in frontend.tokens
    finished.set()
    await frontend.until_ended(1)
    assert re.fullmatch(PATTERN, text(frontend.tokens[1]))


async def test_a_constrained_request_gains_a_token_in_every_other_step(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, worker: WorkerThread
) -> None:
    await unharmed(stub, 9, [9])  # the tokenizer has been read
    worker.step_seconds = 0.02
    frontend = Frontend(stub)
    await frontend.call.write(submit(1, [1], 110))
    await frontend.call.write(constrained(2, [2], pattern="[a-z]{30}"))
    await frontend.until_ended(2)
    assert len(frontend.tokens[2]) == 30
    assert len(frontend.tokens[1]) <= 75, "a step for each token, one to make its mask in, and no third"


async def test_a_constraint_that_cannot_be_served_ends_its_request_alone(
    stub: scheduler_pb2_grpc.SchedulerServiceStub,
) -> None:
    frontend = Frontend(stub)
    await frontend.call.write(constrained(1, [1], pattern="(a"))
    await frontend.call.write(constrained(2, [2]))
    await frontend.until_ended(1, 2)
    assert frontend.ended[1].status == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "unclosed group" in frontend.ended[1].error
    assert frontend.ended[1].param == "structured_output.regex"
    assert re.fullmatch(PATTERN, text(frontend.tokens[2]))
    assert await used_blocks(stub) == 0


async def test_an_abort_while_the_mask_is_made_frees_the_blocks(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished, started, real = threading.Event(), threading.Event(), Matcher.mask

    def slow(matcher: Matcher) -> Mask | None:
        started.set()
        assert finished.wait(20)
        return real(matcher)

    monkeypatch.setattr(Matcher, "mask", slow)
    frontend = Frontend(stub)
    await frontend.call.write(constrained(1, [1] * 9))
    async with asyncio.timeout(20):
        while not await used_blocks(stub) or not started.is_set():
            await asyncio.sleep(0.01)
    await frontend.call.write(pb.ConnectRequest(abort=pb.Abort(handle=1)))
    async with asyncio.timeout(5):
        while await used_blocks(stub):
            await asyncio.sleep(0.01)
    finished.set()
    await frontend.call.write(constrained(2, [2] * 9))
    await frontend.until_ended(2)
    assert 1 not in frontend.ended
    assert re.fullmatch(PATTERN, text(frontend.tokens[2]))


async def unharmed(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, handle: int, prompt: list[int]
) -> list[int]:
    """What a constrained request generates when nothing happens to it."""
    frontend = Frontend(stub)
    await frontend.call.write(constrained(handle, prompt))
    await frontend.until_ended(handle)
    return frontend.tokens[handle]


@pytest.mark.parametrize("harm", ["a failed step", "a lost worker"])
async def test_harm_does_not_change_a_constrained_output(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, worker: WorkerThread, harm: str
) -> None:
    expected = await unharmed(stub, 1, [1] * 9)
    frontend = Frontend(stub)
    worker.step_seconds = 0.01  # so that a step is planned on top of the one that fails
    await frontend.call.write(submit(1, [2], 60))
    await frontend.call.write(constrained(2, [1] * 9))
    while len(frontend.tokens.get(2, [])) < 5:
        await frontend.receive()
    if harm == "a failed step":
        worker.fail_steps = 1
    else:
        worker.leave_at = 1
    await frontend.until_ended(1, 2)
    assert frontend.tokens[2] == expected
    assert frontend.tokens[1] == continuation([2], 60, VOCAB)
    assert frontend.ended[2].reason == pb.END_REASON_STOP
    assert worker.num_sessions == 1 + (harm == "a lost worker")


@pytest.mark.parametrize("num_known", [0, 1, 7, 15])
async def test_a_request_submitted_again_goes_on_where_its_output_was(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, num_known: int
) -> None:
    prompt = [1] * 9
    expected = await unharmed(stub, 1, prompt)
    assert len(expected) == 15
    frontend = Frontend(stub)
    known = prompt + expected[:num_known]
    await frontend.call.write(constrained(2, known, num_prompt_tokens=len(prompt), resumed=True))
    await frontend.until_ended(2)
    assert frontend.tokens.get(2, []) == expected[num_known:]
    assert frontend.ended[2].reason == pb.END_REASON_STOP


async def test_many_constrained_requests_under_memory_pressure_all_keep_to_their_constraint(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, worker: WorkerThread
) -> None:
    frontend = Frontend(stub)
    handles = range(1, 7)
    for handle in handles:
        await frontend.call.write(constrained(handle, [handle] * 40, max_tokens=80, pattern="[a-z]{70}"))
        await asyncio.sleep(0.02)
    await frontend.until_ended(*handles)
    for handle in handles:
        assert re.fullmatch("[a-z]{70}", text(frontend.tokens[handle]))
    assert await used_blocks(stub) == 0


async def test_an_idle_scheduler_reads_the_tokenizer_before_anyone_has_to_wait_for_it(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, load = threading.Event(), Vocabulary.load

    def noted(*arguments: Any) -> Vocabulary:
        vocabulary = load(*arguments)
        read.set()
        return vocabulary

    monkeypatch.setattr(Vocabulary, "load", noted)
    assert await asyncio.to_thread(read.wait, 20)
    monkeypatch.setattr(Vocabulary, "load", lambda *_: pytest.fail("it was read again"))
    frontend = Frontend(stub)
    await frontend.call.write(constrained(1, [1]))
    await frontend.until_ended(1)
    assert re.fullmatch(PATTERN, text(frontend.tokens[1]))
