"""Clients of one service do not keep each other waiting."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc

from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from tools.service import Service

ROWS = 4
PACED = ("--engine", "null", "--null-step-ms", "5", "--max-num-seqs", str(ROWS), "--max-model-len", "131072")


async def test_a_newcomer_is_answered_though_a_flood_holds_every_row_and_has_a_queue(
    tmp_path: Path, smollm2_dir: Path
) -> None:
    with Service(tmp_path, options=PACED) as service:
        async with grpc.aio.insecure_channel(service.grpc_target) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            endless = pb.SamplingParams(max_tokens=100_000)
            request = pb.GenerateRequest(text="Once", sampling=endless, user="flood")
            flood = [asyncio.ensure_future(stub.GenerateOnce(request)) for _ in range(5 * ROWS)]
            async with asyncio.timeout(30):
                while service.metrics()["pagewire:num_requests_waiting"] < 4 * ROWS:
                    await asyncio.sleep(0.05)
            newcomer = pb.GenerateRequest(
                text="Twice", sampling=pb.SamplingParams(max_tokens=5), user="newcomer"
            )
            answer = await asyncio.wait_for(stub.GenerateOnce(newcomer), 30)
            assert len(answer.token_ids) == 5
            assert not any(call.done() for call in flood)
            assert service.metrics()["pagewire:num_preemptions_total"] == 1
            for call in flood:
                call.cancel()
            await asyncio.gather(*flood, return_exceptions=True)
