"""Several frontends share one port of each protocol."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import grpc
import httpx

from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from tools.service import Service

# That all of them reach the same one of two frontends happens once in eight million runs.
NUM_CONNECTIONS = 24


async def complete_over_http(service: Service) -> None:
    async with httpx.AsyncClient(timeout=30) as client:
        body = {"prompt": "Once", "max_tokens": 8}
        response = await client.post(f"{service.http_url}/v1/completions", json=body)
        assert response.json()["usage"]["completion_tokens"] == 8


async def complete_over_grpc(service: Service) -> None:
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(service.grpc_target, options=options) as channel:
        request = pb.GenerateRequest(text="Once", sampling=pb.SamplingParams(max_tokens=8))
        answer = await inference_pb2_grpc.InferenceServiceStub(channel).GenerateOnce(request, timeout=30)
        assert len(answer.token_ids) == 8


async def test_both_of_two_frontends_get_connections(tmp_path: Path, smollm2_dir: Path) -> None:
    with Service(tmp_path, options=("--engine", "null", "--frontends", "2")) as service:
        await asyncio.gather(*(complete_over_http(service) for _ in range(NUM_CONNECTIONS)))
        await asyncio.gather(*(complete_over_grpc(service) for _ in range(NUM_CONNECTIONS)))
    for method in ("POST /v1/completions", "InferenceService/GenerateOnce"):
        served = re.findall(rf"^(frontend-\d) .*{method} ", service.log, re.MULTILINE)
        assert len(served) == NUM_CONNECTIONS
        assert set(served) == {"frontend-0", "frontend-1"}
