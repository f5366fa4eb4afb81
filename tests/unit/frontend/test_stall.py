"""Writes to calls that have ended."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from frontend.grpc.stall import StallWatch


async def test_a_write_after_the_deadline_ends_the_task_as_a_cancellation_does() -> None:
    outcome: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()

    async def write(context: grpc.aio.ServicerContext, watch: StallWatch) -> None:
        time.sleep(0.3)  # noqa: ASYNC251  the deadline passes; the call's own task is told first, this one not yet
        try:
            await watch.write(context, Empty())
        except BaseException as error:
            outcome.set_result(error)
            raise

    async def answer(_: bytes, context: grpc.aio.ServicerContext) -> None:
        with StallWatch(10.0, "a-request") as watch:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(write(context, watch))

    server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(answer, response_serializer=Empty.SerializeToString)
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("tests.Stall", {"Answer": handler})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError, match="DEADLINE_EXCEEDED"):
                async for _ in channel.unary_stream("/tests.Stall/Answer")(b"", timeout=0.1):
                    pass
            assert isinstance(await asyncio.wait_for(outcome, 5), asyncio.CancelledError)
    finally:
        await server.stop(None)
