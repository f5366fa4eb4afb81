"""Triton's gRPC service, asked by Triton's own clients. Their stubs and ours have messages of the same names,
which share this process because ours have a pool of their own."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from frontend.grpc.triton import stream as infer_stream
from pagewire.scheduler.v1 import scheduler_pb2
from pagewire.triton import triton_pb2
from tests.unit.frontend.conftest import FrontendFactory, RunningFrontend
from tests.unit.frontend.scripted_scheduler import ScriptedScheduler, failure

pytest.importorskip("tritonclient")

import tritonclient.grpc as tritongrpc
import tritonclient.grpc.aio as tritonaio
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException

METHOD = "/inference.GRPCInferenceService/"
LENGTH = scheduler_pb2.END_REASON_LENGTH


def tensor(name: str, values: object, datatype: str) -> tritongrpc.InferInput:
    formats = {"BYTES": object, "INT32": np.int32, "UINT32": np.uint32, "BOOL": bool, "FP32": np.float32}
    array = np.array(values, dtype=formats[datatype])
    given = tritongrpc.InferInput(name, array.shape, datatype)
    given.set_data_from_numpy(array)
    return given


def prompt(text: str, *, stream: bool | None = None, max_tokens: int = 20) -> list[tritongrpc.InferInput]:
    inputs = [
        tensor("text_input", [[text]], "BYTES"),
        tensor("max_tokens", [[max_tokens]], "UINT32"),
    ]
    return inputs if stream is None else [*inputs, tensor("stream", [[stream]], "BOOL")]


def request(
    text: str = "hi", *, stream: bool = True, id: str = "", **parameters: object
) -> triton_pb2.ModelInferRequest:
    """One with its tensors in `contents`, as clients of other languages send them."""
    message = triton_pb2.ModelInferRequest(model_name="ensemble", id=id)
    inputs = (
        ("text_input", "BYTES", [text.encode()]),
        ("max_tokens", "INT32", [50]),
        ("stream", "BOOL", [stream]),
    )
    fields = {"BYTES": "bytes_contents", "INT32": "int_contents", "BOOL": "bool_contents"}
    for name, datatype, values in inputs:
        given = message.inputs.add(name=name, datatype=datatype, shape=[1, 1])
        getattr(given.contents, fields[datatype]).extend(values)
    for name, value in parameters.items():
        setattr(message.parameters[name], "bool_param" if isinstance(value, bool) else "int64_param", value)
    return message


class RawStream:
    """ModelStreamInfer without a client library."""

    def __init__(self, channel: grpc.aio.Channel, **options: object) -> None:
        method = channel.stream_stream(
            f"{METHOD}ModelStreamInfer", response_deserializer=triton_pb2.ModelStreamInferResponse.FromString
        )
        self.call = method(**options)

    async def send(self, message: triton_pb2.ModelInferRequest | bytes) -> None:
        await self.call.write(message if isinstance(message, bytes) else message.SerializeToString())

    async def read(self) -> triton_pb2.ModelStreamInferResponse:
        return await asyncio.wait_for(self.call.read(), 5)

    async def rest(self) -> list[triton_pb2.ModelStreamInferResponse]:
        """Half-closes, and reads to the end."""
        await self.call.done_writing()
        responses = []
        while (response := await self.read()) is not grpc.aio.EOF:
            responses.append(response)
        return responses


@pytest.fixture
async def channel(frontend: RunningFrontend) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(frontend.target) as channel:
        yield channel


@pytest.fixture
async def client(frontend: RunningFrontend) -> AsyncIterator[tritonaio.InferenceServerClient]:
    async with tritonaio.InferenceServerClient(frontend.target) as client:
        yield client


def text_of(response: triton_pb2.ModelStreamInferResponse) -> str:
    raw = response.infer_response.raw_output_contents[0]
    assert int.from_bytes(raw[:4], "little") == len(raw) - 4
    return raw[4:].decode()


def is_final(response: triton_pb2.ModelStreamInferResponse) -> bool:
    assert response.infer_response.parameters["triton_final_response"].HasField("bool_param")
    return response.infer_response.parameters["triton_final_response"].bool_param


def test_every_field_has_the_number_and_the_type_of_tritons_own() -> None:
    def compare(ours, theirs) -> None:
        for field in ours.fields:
            other = theirs.fields_by_name[field.name]
            assert (field.number, field.type) == (other.number, other.type), field.full_name
            assert field.is_repeated == other.is_repeated, field.full_name
        for nested in ours.nested_types:
            compare(nested, theirs.nested_types_by_name[nested.name])

    for name, message in triton_pb2.DESCRIPTOR.message_types_by_name.items():
        there = service_pb2 if hasattr(service_pb2, name) else model_config_pb2
        compare(message, getattr(there, name).DESCRIPTOR)
    assert dict(triton_pb2.DataType.items()) == dict(model_config_pb2.DataType.items())
    ours = triton_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert {each.name for each in ours.methods} == {each.name for each in theirs.methods}


async def test_the_client_is_told_of_server_and_model(client: tritonaio.InferenceServerClient) -> None:
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready("ensemble")
    assert not await client.is_model_ready("none")
    assert not await client.is_model_ready("ensemble", "2")
    assert (await client.get_server_metadata(as_json=True))["name"] == "pagewire"
    metadata = await client.get_model_metadata("tensorrt_llm_bls", as_json=True)
    assert {"name": "text_input", "datatype": "BYTES", "shape": ["-1", "1"]} in metadata["inputs"]
    config = (await client.get_model_config("bytes")).config
    assert config.model_transaction_policy.decoupled
    optional = {each.name: each.optional for each in config.input}
    assert (optional["text_input"], optional["stop_words"]) == (False, True)
    assert {each.name: each.data_type for each in config.output}[
        "text_output"
    ] == model_config_pb2.TYPE_STRING
    index = await client.get_model_repository_index()
    assert [each.name for each in index.models] == ["bytes", "ensemble", "tensorrt_llm_bls"]
    with pytest.raises(InferenceServerException, match="unknown model") as raised:
        await client.get_model_config("none")
    assert raised.value.status() == "StatusCode.NOT_FOUND"


async def test_what_is_not_served_is_unimplemented(client: tritonaio.InferenceServerClient) -> None:
    for call in (
        client.load_model("ensemble"),
        client.unload_model("ensemble"),
        client.get_system_shared_memory_status(),
        client.register_system_shared_memory("a", "/a", 8),
        client.unregister_system_shared_memory(),
        client.get_cuda_shared_memory_status(),
        client.unregister_cuda_shared_memory(),
        client.get_trace_settings(),
        client.get_log_settings(),
    ):
        with pytest.raises(InferenceServerException, match="is not supported by this server") as raised:
            await call
        assert raised.value.status() == "StatusCode.UNIMPLEMENTED"


async def test_the_client_infers(
    client: tritonaio.InferenceServerClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = " wörld".encode()
    result = await client.infer("ensemble", prompt("hello"), request_id="7", client_timeout=20)
    assert result.as_numpy("text_output").tolist() == ["hello wörld".encode()]
    answer = result.get_response()
    assert (answer.id, answer.model_name, answer.model_version) == ("7", "ensemble", "1")
    statistics = await client.get_inference_statistics("ensemble")
    assert statistics.model_stats[0].inference_stats.success.count == 1
    excluded = [*prompt("hello"), tensor("exclude_input_in_output", [[True]], "BOOL")]
    result = await client.infer("ensemble", excluded)
    assert result.as_numpy("text_output").tolist() == [" wörld".encode()]


async def test_wrong_requests_are_refused_with_their_status(
    client: tritonaio.InferenceServerClient,
) -> None:
    for inputs, part in (
        (prompt("a", stream=True), "ModelStreamInfer"),
        (prompt("a")[:1], "needs the input max_tokens"),
        ([*prompt("a"), tensor("nothing", [[1]], "INT32")], "unexpected inference input"),
        ([*prompt("a"), tensor("top_p", [[3.0]], "FP32")], "top_p is 3"),
        ([*prompt("a"), tensor("top_p", [[True]], "BOOL")], "must be FP32"),
        ([*prompt("a"), *[tensor("top_k", [[1]], "INT32")] * 255], "inputs has 257 entries"),
    ):
        with pytest.raises(InferenceServerException, match=part) as raised:
            await client.infer("ensemble", inputs)
        assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"


async def test_the_callback_client_streams_many_requests(
    frontend: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    """The client's threads want an event loop that is free, so it has a thread of its own."""
    scheduler.reply = b"abcde"
    scheduler.pause_between_tokens = 0.005
    came: queue.Queue = queue.Queue()

    def stream() -> None:
        with tritongrpc.InferenceServerClient(frontend.target) as client:
            client.start_stream(callback=lambda result, error: came.put((result, error)))
            for number in range(20):
                client.async_stream_infer(
                    "ensemble", prompt(f"p{number}", stream=number % 2 == 0), request_id=str(number)
                )
            client.async_stream_infer("none", prompt("x"), request_id="wrong")
            client.stop_stream()  # half-closes, and waits for the rest

    await asyncio.wait_for(asyncio.to_thread(stream), 30)
    texts: dict[str, list[str]] = {}
    order: list[str] = []
    finals: list[str] = []
    errors: list[InferenceServerException] = []
    while not came.empty():
        result, error = came.get()
        if error is not None:
            errors.append(error)
            continue
        response = result.get_response()
        order.append(response.id)
        texts.setdefault(response.id, []).append(result.as_numpy("text_output")[0].decode())
        if response.parameters["triton_final_response"].bool_param:
            finals.append(response.id)
    assert [error.message().partition(";")[0] for error in errors] == ["unknown model 'none'"]
    assert sorted(finals) == sorted(map(str, range(20)))
    for number in range(20):
        deltas = texts[str(number)]
        assert "".join(deltas) == ("abcde" if number % 2 == 0 else f"p{number}abcde")
        assert len(deltas) > 2 or number % 2
    assert order != sorted(order), "requests are answered side by side"


async def test_an_empty_final_response_is_sent_to_who_asks_for_it(
    channel: grpc.aio.Channel, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = b"ab"
    stream = RawStream(channel)
    for is_streamed in (True, False):
        await stream.send(
            request(id=str(is_streamed), stream=is_streamed, triton_enable_empty_final_response=True)
        )
    told: dict[str, list] = {"True": [], "False": []}
    for response in await stream.rest():
        outputs = response.infer_response.outputs
        told[response.infer_response.id].append((is_final(response), len(outputs)))
    for responses in told.values():
        assert responses[-1] == (True, 0)
        assert set(responses[:-1]) == {(False, 1)}


async def test_a_request_that_fails_leaves_the_stream_open(
    channel: grpc.aio.Channel, scheduler: ScriptedScheduler
) -> None:
    stream = RawStream(channel)
    await stream.send(request(id="one"))
    await stream.send(request(id="two"))
    one, two = await scheduler.submitted(1), await scheduler.submitted(2)
    await scheduler.say(one.handle, [97])
    assert text_of(await stream.read()) == "a"
    await scheduler.say(one.handle, [], end=failure(8, "too much"))
    failed = await stream.read()
    assert (failed.error_message, failed.infer_response.id) == ("too much", "one")
    assert is_final(failed)
    await stream.send(b"\xff\xff")
    assert "no valid protobuf" in (await stream.read()).error_message
    await stream.send(triton_pb2.ModelInferRequest(model_name="ensemble", id="\u2028" * 200))
    wrong = await stream.read()
    assert "needs the input text_input" in wrong.error_message
    assert wrong.infer_response.id == "\u2028" * 200
    await scheduler.say(two.handle, [98, 99], end=scheduler_pb2.Ended(reason=LENGTH))
    (last,) = await stream.rest()
    assert (text_of(last), last.infer_response.id, is_final(last)) == ("bc", "two", True)
    assert await stream.call.code() is grpc.StatusCode.OK


async def test_a_half_close_lets_requests_finish(
    channel: grpc.aio.Channel, scheduler: ScriptedScheduler
) -> None:
    stream = RawStream(channel)
    await stream.send(request())
    await stream.call.done_writing()
    submit = await scheduler.submitted()
    await scheduler.say(submit.handle, [97])
    assert not is_final(await stream.read())
    await scheduler.say(submit.handle, [98], end=scheduler_pb2.Ended(reason=LENGTH))
    assert is_final(await stream.read())
    assert await stream.read() is grpc.aio.EOF


@pytest.mark.parametrize("how", ["cancel", "deadline", "disconnect"])
async def test_a_cancelled_stream_aborts_all_its_requests(
    frontend: RunningFrontend, scheduler: ScriptedScheduler, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with grpc.aio.insecure_channel(frontend.target) as channel:
        stream = RawStream(channel, timeout=0.5 if how == "deadline" else None)
        for _ in range(3):
            await stream.send(request())
        submits = [await scheduler.submitted(count) for count in (1, 2, 3)]
        await scheduler.say(submits[0].handle, [97])
        await stream.read()
        if how == "cancel":
            stream.call.cancel()
        elif how == "disconnect":
            await channel.close()
        await scheduler.until(lambda each: {submit.handle for submit in submits} <= set(each.aborts))
    assert "Traceback" not in caplog.text


async def test_requests_beyond_the_most_wait_for_those_before_them(
    channel: grpc.aio.Channel, scheduler: ScriptedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infer_stream, "MAX_OPEN", 2)
    stream = RawStream(channel)
    for number in range(3):
        await stream.send(request(id=str(number)))
    first = await scheduler.submitted(1)
    await scheduler.submitted(2)
    await asyncio.sleep(0.1)
    assert len(scheduler.submits) == 2
    await scheduler.say(first.handle, [97], end=scheduler_pb2.Ended(reason=LENGTH))
    await scheduler.submitted(3)
    stream.call.cancel()


async def test_a_client_that_takes_nothing_is_given_up(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    scheduler.max_model_len = 10**6
    frontend = await start_frontend(stall_timeout=0.5)
    options = (("grpc.http2.lookahead_bytes", 1), ("grpc.http2.bdp_probe", 0))
    async with grpc.aio.insecure_channel(frontend.target, options=options) as channel:
        stream = RawStream(channel)
        await stream.send(request())
        submit = await scheduler.submitted()
        filling = asyncio.create_task(keep_saying(scheduler, submit.handle))
        await scheduler.aborted(submit.handle)
        filling.cancel()


async def keep_saying(scheduler: ScriptedScheduler, handle: int) -> None:
    while True:
        await scheduler.say(handle, [97] * 5000)
        await asyncio.sleep(0.005)


async def test_keys_are_checked_as_for_our_own_service(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = b"a"
    frontend = await start_frontend(api_keys=("secret",))
    async with tritonaio.InferenceServerClient(frontend.target) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        with pytest.raises(InferenceServerException, match="API key is required") as raised:
            await client.infer("ensemble", prompt("a"))
        assert raised.value.status() == "StatusCode.UNAUTHENTICATED"
        key = {"authorization": "Bearer secret"}
        result = await client.infer("ensemble", prompt("a"), headers=key)
        assert result.as_numpy("text_output").tolist() == [b"aa"]
    async with grpc.aio.insecure_channel(frontend.target) as channel:
        refused = RawStream(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="API key is required"):
            await refused.read()
        allowed = RawStream(channel, metadata=(("authorization", "Bearer secret"),))
        await allowed.send(request(stream=False))
        assert text_of(await allowed.read()) == "hia"


async def test_the_deadline_and_the_timeout_end_a_request(
    client: tritonaio.InferenceServerClient, scheduler: ScriptedScheduler
) -> None:
    with pytest.raises(InferenceServerException, match="deadline passed") as raised:
        await client.infer("ensemble", prompt("a"), timeout=100_000)  # microseconds
    assert raised.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    submit = await scheduler.submitted()
    assert 0 < submit.timeout <= 0.1


async def test_beams_come_in_one_response(channel: grpc.aio.Channel, scheduler: ScriptedScheduler) -> None:
    message = request(stream=False)
    message.inputs[1].contents.int_contents[0] = 1
    message.inputs[2].CopyFrom(message.inputs[1])
    message.inputs[2].name, message.inputs[2].contents.int_contents[0] = "beam_width", 2
    stream = RawStream(channel)
    await stream.send(message)
    submit = await scheduler.submitted()
    top = scheduler_pb2.TokenLogprobs(
        logprob=-0.25, top_ids=[97, 98, 99, 100], top_logprobs=[-0.25, -0.5, -1, -2]
    )
    await scheduler.say(submit.handle, [97], logprobs=[top], end=scheduler_pb2.Ended(reason=LENGTH))
    (response,) = await stream.rest()
    assert response.infer_response.raw_output_contents[0] == b"\x03\0\0\0hia\x03\0\0\0hib"
    assert [output.name for output in response.infer_response.outputs] == ["text_output", "sequence_index"]


async def test_deltas_of_several_sequences_that_come_together_stay_apart(
    channel: grpc.aio.Channel, scheduler: ScriptedScheduler
) -> None:
    message = request(num_return_sequences=2, top_k=2)
    message.outputs.add(name="text_output")
    stream = RawStream(channel)
    await stream.send(message)
    await scheduler.submitted(2)
    handles = [submit.handle for submit in scheduler.submits]
    await scheduler.send(scheduler_pb2.StepDeltas(handles=handles, token_ids=[97, 98]))
    assert [text_of(await stream.read()) for _ in handles] == ["a", "b"]
    ends = [scheduler_pb2.Ended(handle=handle, reason=LENGTH) for handle in handles]
    await scheduler.send(scheduler_pb2.StepDeltas(handles=handles, token_ids=[99, 100], ended=ends))
    last = await stream.rest()
    assert [(text_of(response), is_final(response)) for response in last] == [("c", False), ("d", True)]


async def test_reflection_and_health_know_the_service(frontend: RunningFrontend) -> None:
    def ask() -> None:
        with grpc.insecure_channel(frontend.target) as channel:
            described = ProtoReflectionDescriptorDatabase(channel)
            assert {"inference.GRPCInferenceService", "pagewire.inference.v1.InferenceService"} <= set(
                described.get_services()
            )
            pool = DescriptorPool(described)
            assert pool.FindServiceByName("inference.GRPCInferenceService").methods_by_name["ModelInfer"]
            assert pool.FindMessageTypeByName("pagewire.inference.v1.GenerateRequest")

    await asyncio.to_thread(ask)


async def test_requests_are_named_in_the_log_as_their_clients_name_them(
    channel: grpc.aio.Channel, scheduler: ScriptedScheduler, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler.reply = b"a"
    caplog.set_level("INFO", logger="frontend.access")
    stream = RawStream(channel)
    await stream.send(request(id="streamed"))
    await stream.rest()
    infer = channel.unary_unary(f"{METHOD}ModelInfer", triton_pb2.ModelInferRequest.SerializeToString)
    call = infer(request(id="whole", stream=False))
    await call
    assert ("x-request-id", "whole") in tuple(await call.trailing_metadata())
    assert "streamed" in caplog.text
    assert "whole" in caplog.text
    assert [submit.request_id for submit in scheduler.submits] == ["streamed", "whole"]
