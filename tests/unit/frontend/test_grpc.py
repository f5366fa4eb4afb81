"""The public gRPC API, against a scripted scheduler."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pagewire.base.errors import Code, InvalidRequest, NotFound, Overloaded, Unauthenticated, Unavailable
from pagewire.client import AsyncClient
from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from pagewire.scheduler.v1 import scheduler_pb2
from pagewire.wire.sampling_params import SamplingParams
from tests.unit.frontend.conftest import FrontendFactory, RunningFrontend
from tests.unit.frontend.scripted_scheduler import EOS, ScriptedScheduler, failure, stop


@pytest.fixture
async def channel(frontend: RunningFrontend):
    async with grpc.aio.insecure_channel(frontend.target) as channel:
        yield channel


@pytest.fixture
def stub(channel) -> inference_pb2_grpc.InferenceServiceStub:
    return inference_pb2_grpc.InferenceServiceStub(channel)


@pytest.fixture
async def client(frontend: RunningFrontend):
    async with AsyncClient(frontend.target, max_retries=0) as client:
        yield client


async def test_generate_streams_deltas_and_one_finished(stub, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = "né".encode()
    request = pb.GenerateRequest(text="p", request_id="mine", sampling=pb.SamplingParams(seed=1))
    events = [event async for event in stub.Generate(request)]
    assert {event.request_id for event in events} == {"mine"}
    assert [event.WhichOneof("event") for event in events] == ["delta"] * (len(events) - 1) + ["finished"]
    deltas = [event.delta for event in events[:-1]]
    assert "".join(delta.text for delta in deltas) == "né"
    assert [token for delta in deltas for token in delta.token_ids] == [*"né".encode(), EOS]
    finished = events[-1].finished
    assert finished.finish_reason == pb.FINISH_REASON_STOP
    assert finished.WhichOneof("stop") is None
    assert finished.usage == pb.Usage(prompt_tokens=1, cached_tokens=0, completion_tokens=4)


async def test_generate_once_equals_the_stream(client: AsyncClient, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = "a ☃ and a stop here, and more".encode()
    params = SamplingParams(stop=["stop here"], include_stop_str_in_output=True)
    whole = await client.generate(messages=[{"role": "user", "content": "x"}], sampling_params=params)
    messages = [{"role": "user", "content": "x"}]
    deltas = [delta async for delta in client.generate(None, params, messages=messages, stream=True)]
    assert whole.text == "".join(delta.text for delta in deltas) == "a ☃ and a stop here"
    assert list(whole.token_ids) == [token for delta in deltas for token in delta.token_ids]
    assert whole.finished.stop_string == "stop here"
    assert bytes(whole.token_ids).decode() == whole.text


async def test_tokens_that_come_while_the_client_is_slow_make_the_same_output(client, scheduler) -> None:
    """All tokens at once, past the stop string, as a merged delta would have them."""
    asking = asyncio.create_task(client.generate("p", SamplingParams(stop=["b"])))
    submit = await scheduler.submitted()
    await scheduler.say(submit.handle, b"aabaa")
    whole = await asking
    assert (whole.text, list(whole.token_ids)) == ("aa", list(b"aab"))
    assert whole.finished.usage.completion_tokens == 3
    await scheduler.aborted(submit.handle)


@pytest.mark.parametrize(("include", "text"), [(False, "a"), (True, "ab")])
async def test_stop_token_is_left_out_of_the_text_unless_asked_for(client, scheduler, include, text) -> None:
    params = SamplingParams(stop_token_ids=[98], include_stop_str_in_output=include)
    asking = asyncio.create_task(client.generate("p", params))
    submit = await scheduler.submitted()
    assert list(submit.sampling.stop_token_ids) == [98]
    await scheduler.say(submit.handle, b"ab", end=stop(98), cached=1)
    whole = await asking
    assert (whole.text, whole.finished.stop_token_id) == (text, 98)
    assert list(whole.token_ids) == list(b"ab")
    assert whole.finished.usage.cached_tokens == 1


async def test_text_held_back_for_a_stop_string_is_released_at_the_end(client, scheduler) -> None:
    scheduler.reply = b"almost a sto"
    assert (await client.generate("p", SamplingParams(stop=["stop"]))).text == "almost a sto"


async def test_stop_string_is_not_looked_for_before_min_tokens(client, scheduler) -> None:
    scheduler.reply = b"ab ab ab"
    whole = await client.generate("p", SamplingParams(stop=["b"], min_tokens=4))
    assert whole.text == "ab a"


async def test_logprobs_carry_text_and_bytes(client, scheduler) -> None:
    asking = asyncio.create_task(client.generate("p", SamplingParams(logprobs=1)))
    submit = await scheduler.submitted()
    entry = scheduler_pb2.TokenLogprobs(logprob=-1, top_ids=[195], top_logprobs=[-0.5])
    end = scheduler_pb2.Ended(reason=scheduler_pb2.END_REASON_LENGTH)
    await scheduler.say(submit.handle, [97], logprobs=[entry], end=end)
    (position,) = (await asking).logprobs
    assert (position.sampled.text, position.sampled.raw, position.sampled.logprob) == ("a", b"a", -1)
    (top,) = position.top
    assert (top.token_id, top.text, top.raw, top.logprob) == (195, "\N{REPLACEMENT CHARACTER}", b"\xc3", -0.5)


async def test_cancelled_call_is_aborted(stub, scheduler: ScriptedScheduler) -> None:
    call = stub.Generate(pb.GenerateRequest(text="p"))
    submit = await scheduler.submitted()
    await scheduler.say(submit.handle, [97])
    assert (await call.read()).delta.text == "a"
    call.cancel()
    await scheduler.aborted(submit.handle)


async def test_deadline_of_the_call_aborts_the_request(stub, scheduler: ScriptedScheduler) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.GenerateOnce(pb.GenerateRequest(text="p"), timeout=0.2)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0 < scheduler.submits[0].timeout <= 0.2
    await scheduler.aborted(scheduler.submits[0].handle)


async def test_timeout_of_the_request_aborts_it(stub, scheduler: ScriptedScheduler) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.GenerateOnce(pb.GenerateRequest(text="p", timeout=0.1), timeout=5)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await scheduler.aborted(scheduler.submits[0].handle)


async def test_the_schedulers_errors_pass_through(client, scheduler) -> None:
    asking = asyncio.create_task(client.generate("p"))
    submit = await scheduler.submitted()
    await scheduler.say(submit.handle, [], end=failure(Code.RESOURCE_EXHAUSTED, "1024 requests wait"))
    with pytest.raises(Overloaded, match="1024 requests wait"):
        await asking


async def test_a_frontend_that_was_just_started_waits_for_the_engine(
    start_frontend: FrontendFactory, scheduler
) -> None:
    scheduler.ready, scheduler.reply = False, b"x"
    frontend = await start_frontend(wait=False)
    async with AsyncClient(frontend.target, max_retries=0) as client:
        asking = asyncio.create_task(client.generate("p"))
        await scheduler.until(lambda scheduler: scheduler.num_streams == 1)
        await asyncio.sleep(0.1)
        assert not asking.done()
        await scheduler.attach_engine()
        assert (await asyncio.wait_for(asking, 5)).text == "x"


async def test_health_follows_the_engine(start_frontend: FrontendFactory, scheduler) -> None:
    scheduler.ready = False
    frontend = await start_frontend(wait=False, reconnect_timeout=0.1)
    async with (
        grpc.aio.insecure_channel(frontend.target) as channel,
        AsyncClient(frontend.target, max_retries=0) as client,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(Unavailable):
            await client.generate("p")
        await scheduler.until(lambda scheduler: scheduler.num_streams == 1)
        await scheduler.attach_engine()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


async def test_reflection_lists_the_services(channel) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    async for response in stub.ServerReflectionInfo(iter([request])):
        names = {service.name for service in response.list_services_response.service}
        assert {"pagewire.inference.v1.InferenceService", "grpc.health.v1.Health"} <= names
        break


async def test_keys_are_required_once_configured(start_frontend: FrontendFactory, scheduler) -> None:
    scheduler.reply = b"x"
    frontend = await start_frontend(api_keys=("one", "two"))
    for key, allowed in ((None, False), ("three", False), ("two", True)):
        async with AsyncClient(frontend.target, api_key=key, max_retries=0) as client:
            if allowed:
                assert (await client.generate("p")).text == "x"
            else:
                with pytest.raises(Unauthenticated):
                    await client.generate("p")
                with pytest.raises(Unauthenticated):
                    [event async for event in client.generate("p", stream=True)]
    async with grpc.aio.insecure_channel(frontend.target) as channel:
        request = health_pb2.HealthCheckRequest()
        response = await health_pb2_grpc.HealthStub(channel).Check(request)
        assert response.status == health_pb2.HealthCheckResponse.SERVING


async def test_models_tokens_and_load(stub, client: AsyncClient) -> None:
    (model,) = await client.models()
    assert (model.id, model.max_model_len, model.vocab_size) == ("bytes", 200, 257)
    assert await client.tokenize("hé") == list("hé".encode())
    assert bytes(await client.tokenize(messages=[{"role": "user", "content": "x"}])) == b"<user>x<assistant>"
    assert (await stub.Detokenize(pb.DetokenizeRequest(token_ids=list("hé".encode())))).text == "hé"
    load = await stub.GetLoad(pb.GetLoadRequest())
    assert (load.num_requests_running, load.kv_cache_usage, load.max_num_seqs) == (3, 0.25, 8)


async def test_unknown_model_and_missing_prompt_are_named(stub, client: AsyncClient) -> None:
    with pytest.raises(NotFound, match="'other' does not exist"):
        await client.generate("p", model="other")
    with pytest.raises(InvalidRequest, match="exactly one"):
        await client.generate()
    with pytest.raises(grpc.aio.AioRpcError, match="no prompt") as raised:
        await stub.GenerateOnce(pb.GenerateRequest())
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
