"""Requests that want something of their prompt: log probabilities or a pooled state, through the service."""

from __future__ import annotations

from dataclasses import replace

import grpc
import numpy as np
import pytest

from engine.dispatch.sampling import Pooling
from pagewire.base.errors import InvalidRequest, Unsupported
from pagewire.inference.v1 import inference_pb2
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from pagewire.scheduler.v1 import scheduler_pb2_grpc
from pagewire.wire.sampling_params import SamplingParams
from scheduler.serve.intake import make_request
from tests.unit.scheduler.executor import continuation, pooled_state, prompt_logprob
from tests.unit.scheduler.test_service import (
    FACTS,
    VOCAB,
    Frontend,
    WorkerThread,
    request,
    stub,
    submit,
    used_blocks,
    worker,
)

__all__ = ["stub", "worker"]


def logprobs_wanted(
    handle: int, prompt: list[int], max_tokens: int, top: int = 1, **fields: object
) -> pb.ConnectRequest:
    message = submit(handle, prompt, max_tokens, **fields)  # type: ignore[arg-type]
    message.submit.sampling.prompt_logprobs = top
    return message


def pooling(handle: int, prompt: list[int], kind: int) -> pb.ConnectRequest:
    return pb.ConnectRequest(submit=pb.Submit(handle=handle, token_ids=prompt, pooling=kind))


def expected_logprobs(prompt: list[int]) -> list[float]:
    return [prompt_logprob(prompt, index) for index in range(1, len(prompt))]


async def test_each_prompt_token_is_told_of_once_although_its_beginning_is_cached(
    stub: scheduler_pb2_grpc.SchedulerServiceStub,
) -> None:
    prompt = [index % 7 for index in range(41)]
    frontend = Frontend(stub)
    for handle in (1, 2):  # the second finds all of it in the cache
        await frontend.call.write(logprobs_wanted(handle, prompt, 5))
        await frontend.until_ended(handle)
        assert frontend.prompt_logprobs[handle] == expected_logprobs(prompt)
        assert frontend.tokens[handle] == continuation(prompt, 5, VOCAB)
        assert frontend.ended[handle].num_cached_tokens == 0


@pytest.mark.parametrize("harm", ["a failed step", "a lost worker"])
async def test_harm_neither_repeats_nor_loses_a_prompts_log_probabilities(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, worker: WorkerThread, harm: str
) -> None:
    prompt = [index % 7 for index in range(90)]
    worker.step_seconds = 0.01  # so that a step is planned on top of the one that fails
    frontend = Frontend(stub)
    await frontend.call.write(logprobs_wanted(1, prompt, 5, top=3))
    while not frontend.prompt_logprobs.get(1):
        await frontend.receive()
    assert 1 not in frontend.tokens
    if harm == "a failed step":
        worker.fail_steps = 1
    else:
        worker.leave_at = 1
    await frontend.until_ended(1)
    assert frontend.prompt_logprobs[1] == expected_logprobs(prompt)
    assert frontend.tokens[1] == continuation(prompt, 5, VOCAB)


async def test_a_request_submitted_again_is_told_of_its_prompt_again(
    stub: scheduler_pb2_grpc.SchedulerServiceStub,
) -> None:
    prompt = [index % 7 for index in range(21)]
    output = continuation(prompt, 8, VOCAB)
    frontend = Frontend(stub)
    message = logprobs_wanted(1, prompt + output[:3], 8, num_prompt_tokens=len(prompt), resumed=True)
    await frontend.call.write(message)
    await frontend.until_ended(1)
    assert frontend.prompt_logprobs[1] == expected_logprobs(prompt)
    assert frontend.tokens[1] == output[3:]


@pytest.mark.parametrize("kind", [1, 2, 3])
async def test_a_pooling_request_ends_with_its_state_and_no_token(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, kind: int
) -> None:
    prompts = {1: [1] * 40, 2: [1] * 40, 3: [2] * FACTS.limits.max_model_len, 4: [3]}
    frontend = Frontend(stub)
    for handle, prompt in prompts.items():
        await frontend.call.write(pooling(handle, prompt, kind))
        if handle == 1:
            await frontend.until_ended(1)  # the second's beginning is cached
    await frontend.until_ended(*prompts)
    for handle, prompt in prompts.items():
        assert frontend.pooled[handle] == [float(np.float32(pooled_state(prompt, kind)))]
        assert frontend.ended[handle].reason == pb.END_REASON_STOP
        assert frontend.ended[handle].num_output_tokens == 0
        assert handle not in frontend.tokens
    assert await used_blocks(stub) == 0


async def test_a_pooling_request_survives_a_failed_step(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, worker: WorkerThread
) -> None:
    worker.fail_steps = 1
    worker.step_seconds = 0.01  # so that a step is planned on top of the one that fails
    frontend = Frontend(stub)
    await frontend.call.write(submit(1, [5], 40))
    await frontend.call.write(pooling(2, [6] * 50, 2))
    await frontend.until_ended(1, 2)
    assert frontend.pooled[2] == [float(np.float32(pooled_state([6] * 50, 2)))]
    assert frontend.tokens[1] == continuation([5], 40, VOCAB)


async def test_the_model_says_how_long_a_state_is(stub: scheduler_pb2_grpc.SchedulerServiceStub) -> None:
    assert (await stub.GetModel(pb.GetModelRequest())).hidden_size == FACTS.limits.hidden_size


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("best_of", 2),
        ("prompt_logprobs", 0),
        ("bad_words", ["x"]),
        ("beam_search", inference_pb2.BeamSearch(width=2)),
    ],
)
async def test_a_direct_client_is_refused_what_only_frontends_serve(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, field: str, value: object
) -> None:
    bad = request([1], 5)
    bad.sampling.MergeFrom(inference_pb2.SamplingParams(**{field: value}))  # type: ignore[arg-type]
    bad.sampling.ignore_eos = False
    with pytest.raises(grpc.aio.AioRpcError, match=field) as caught:
        async for _ in stub.Generate(bad):
            pass
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_bad_words_reach_the_worker_as_tokens() -> None:
    made = make_request("r", [1], SamplingParams(), FACTS, bad_words=[[1, 2], [3]])
    assert made.sampling.bad_words == ((1, 2), (3,))


@pytest.mark.parametrize("bad", [[[]], [[VOCAB]], [[1] * 5000]])
def test_bad_words_that_make_no_sense_are_refused(bad: list[list[int]]) -> None:
    with pytest.raises(InvalidRequest, match="bad_words"):
        make_request("r", [1], SamplingParams(), FACTS, bad_words=bad)


def test_an_unknown_pooling_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"pooling is 7.*2 \(mean\)"):
        make_request("r", [1], SamplingParams(), FACTS, pooling=7)


@pytest.mark.parametrize(("task", "part"), [("classify", "classification"), ("embed", "no output proj")])
def test_what_does_not_generate_is_pooled_only(task: str, part: str) -> None:
    facts = replace(FACTS, task=task)
    with pytest.raises(Unsupported, match=part):
        make_request("r", [1], SamplingParams(), facts)
    assert make_request("r", [1], SamplingParams(), facts, pooling=Pooling.LAST).is_pooling
