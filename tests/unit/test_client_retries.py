"""Clients that find no server, or a full one; and calls that their caller gives up."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from pagewire import AsyncClient, Client
from pagewire.base.errors import ConfigError, InvalidRequest, Overloaded, Unavailable
from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc


class Scripted(inference_pb2_grpc.InferenceServiceServicer):
    """Ends calls with the statuses of `script`, and serves those after."""

    def __init__(self) -> None:
        self.script: list[grpc.StatusCode] = []
        self.num_calls = 0
        self.cancelled = threading.Event()

    def GenerateOnce(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> pb.GenerateOnceResponse:
        self._next(context)
        if request.text == "hang":
            context.add_callback(self.cancelled.set)
            self.cancelled.wait(10)
        return pb.GenerateOnceResponse(text="done")

    def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        self._next(context)
        yield pb.GenerateResponse(delta=pb.Delta(text="one"))
        if request.text == "break":
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        yield pb.GenerateResponse(delta=pb.Delta(text="two"))

    def _next(self, context: grpc.ServicerContext) -> None:
        self.num_calls += 1
        if self.script:
            context.set_trailing_metadata((("grpc-retry-pushback-ms", "10"),))
            context.abort(self.script.pop(0), "not now")


@pytest.fixture
def scripted() -> Iterator[tuple[Scripted, str]]:
    servicer = Scripted()
    server = grpc.server(ThreadPoolExecutor(2))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    servicer.cancelled.set()
    server.stop(None)


def test_a_call_is_sent_again_when_the_server_is_away_or_full(scripted: tuple[Scripted, str]) -> None:
    servicer, target = scripted
    servicer.script = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED]
    with Client(target) as client:
        assert client.generate("x").text == "done"
        servicer.script = [grpc.StatusCode.UNAVAILABLE]
        assert "".join(event.text for event in client.generate("x", stream=True)) == "onetwo"
    assert servicer.num_calls == 5


def test_it_is_sent_no_more_often_than_it_may_be(scripted: tuple[Scripted, str]) -> None:
    servicer, target = scripted
    for max_retries, num_calls in ((0, 1), (1, 2)):
        servicer.script, servicer.num_calls = [grpc.StatusCode.RESOURCE_EXHAUSTED] * 5, 0
        with Client(target, max_retries=max_retries) as client, pytest.raises(Overloaded, match="not now"):
            client.generate("x")
        assert servicer.num_calls == num_calls
    with pytest.raises(ConfigError, match="max_retries is 5; it must be between 0 and 4"):
        Client(target, max_retries=5)


def test_what_cannot_succeed_and_what_has_begun_is_not_sent_again(scripted: tuple[Scripted, str]) -> None:
    servicer, target = scripted
    servicer.script = [grpc.StatusCode.INVALID_ARGUMENT]
    with Client(target) as client:
        with pytest.raises(InvalidRequest):
            client.generate("x")
        events = client.generate("break", stream=True)
        assert next(events).text == "one"
        with pytest.raises(Unavailable, match="gone"):
            next(events)
    assert servicer.num_calls == 2


def test_an_interrupted_call_is_cancelled_at_the_server(scripted: tuple[Scripted, str]) -> None:
    servicer, target = scripted
    with Client(target) as client:
        timer = threading.Timer(0.2, signal.raise_signal, (signal.SIGINT,))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            client.generate("hang")
        timer.join()
        assert servicer.cancelled.wait(5)


async def test_a_cancelled_task_is_cancelled_at_the_server(scripted: tuple[Scripted, str]) -> None:
    servicer, target = scripted
    servicer.script = [grpc.StatusCode.UNAVAILABLE]
    async with AsyncClient(target) as client:
        task = asyncio.ensure_future(client.generate("hang"))
        while servicer.num_calls < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(servicer.cancelled.wait, 5)
