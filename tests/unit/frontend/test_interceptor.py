"""How gRPC calls end, whatever their clients do."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from frontend.access_log import AccessLog
from frontend.api_keys import ApiKeys
from frontend.grpc.interceptor import MAX_PARAM, ErrorInterceptor
from frontend.tracing import FrontendTracing
from pagewire.base.errors import InvalidRequest


@asynccontextmanager
async def calling(
    answer: Callable[..., Any], make: Callable[..., Any] = grpc.unary_unary_rpc_method_handler
) -> AsyncIterator[grpc.aio.Channel]:
    """A method behind the interceptor."""
    server = grpc.aio.server(
        interceptors=(ErrorInterceptor(ApiKeys.load((), None), AccessLog(enabled=True), FrontendTracing()),)
    )
    handler = make(answer, Empty.FromString, Empty.SerializeToString)
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("pagewire.tests", {"Answer": handler})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(None)


async def refuse(request: Empty, context: grpc.aio.ServicerContext) -> None:
    raise InvalidRequest("no")


async def fail(request: Empty, context: grpc.aio.ServicerContext) -> None:
    raise RuntimeError("a bug")


async def tell(request: Empty, context: grpc.aio.ServicerContext) -> Empty:
    await context.send_initial_metadata((("x", "y"),))
    return Empty()


@pytest.mark.parametrize(("answer", "num_logged"), [(refuse, 0), (fail, 1), (tell, 0)])
async def test_what_is_told_to_a_call_whose_deadline_has_passed_is_no_failure(
    answer: Callable[..., Any], num_logged: int, caplog: pytest.LogCaptureFixture
) -> None:
    ended = asyncio.Event()

    async def late(request: Empty, context: grpc.aio.ServicerContext) -> Any:
        time.sleep(0.2)  # noqa: ASYNC251  the deadline passes, of which the task has not been told
        ended.set()
        return await answer(request, context)

    caplog.set_level(logging.INFO)
    async with calling(late) as channel:
        call = channel.unary_unary("/pagewire.tests/Answer")
        with pytest.raises(grpc.aio.AioRpcError, match="DEADLINE_EXCEEDED"):
            await call(b"", timeout=0.05)
        await asyncio.wait_for(ended.wait(), 5)
        await asyncio.sleep(0.05)
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(errors) == num_logged, errors
    [line] = [record.getMessage() for record in caplog.records if record.name == "frontend.access"]
    assert ": ipv4:127.0.0.1:" in line


async def generate(requests: AsyncIterator[Empty], context: grpc.aio.ServicerContext) -> AsyncIterator[Empty]:
    async for request in requests:
        time.sleep(0.2)  # noqa: ASYNC251  as above
        yield request


@pytest.mark.parametrize(
    ("sent", "timeout", "told"),
    [(b"", 0.05, "DEADLINE_EXCEEDED"), (b"\xff", 5, "INVALID_ARGUMENT"), (b"", 5, "")],
)
async def test_a_generator_of_answers_ends_as_other_calls_do(
    sent: bytes, timeout: float, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    make = grpc.stream_stream_rpc_method_handler
    status = ""
    async with calling(generate, make) as channel:
        call = channel.stream_stream("/pagewire.tests/Answer")(iter([sent]), timeout=timeout)
        try:
            assert [answer async for answer in call] == [b""]
        except grpc.aio.AioRpcError as error:
            status = error.code().name
        await asyncio.sleep(0.3)
    assert status == told
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("param", ["a\nb", "\0", "\x7f", "é\t", "long" * 5000, "\U0001f600" * 5000])
async def test_a_field_of_any_name_can_be_at_fault(param: str) -> None:
    async def name(request: Empty, context: grpc.aio.ServicerContext) -> None:
        raise InvalidRequest("no", param=param)

    async with calling(name) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.unary_unary("/pagewire.tests/Answer")(b"")
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    told = dict(iter(raised.value.trailing_metadata()))["x-param"]
    assert told.isprintable()
    assert told.isascii()
    assert len(told) <= MAX_PARAM
