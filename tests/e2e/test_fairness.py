"""Clients of one service do not keep each other waiting."""

from __future__ import annotations

import asyncio

import grpc

from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from tests.e2e.service import Service
from tests.e2e.test_lifecycle import until_idle

ROWS = 256


async def test_a_newcomer_is_answered_though_a_flood_holds_every_row_and_has_a_queue(
    null_service: Service,
) -> None:
    async with grpc.aio.insecure_channel(null_service.grpc_target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        endless = pb.SamplingParams(max_tokens=100_000)
        request = pb.GenerateRequest(text="Once", sampling=endless, user="flood")
        flood = [asyncio.ensure_future(stub.GenerateOnce(request)) for _ in range(ROWS + 30)]
        async with asyncio.timeout(30):
            while null_service.metrics()["pagewire:num_requests_waiting"] < 30:
                await asyncio.sleep(0.05)
        newcomer = pb.GenerateRequest(text="Twice", sampling=pb.SamplingParams(max_tokens=5), user="newcomer")
        answer = await asyncio.wait_for(stub.GenerateOnce(newcomer), 20)
        assert len(answer.token_ids) == 5
        assert not any(call.done() for call in flood)
        assert null_service.metrics()["pagewire:num_preemptions_total"] >= 1
        for call in flood:
            call.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
        await until_idle(null_service)
