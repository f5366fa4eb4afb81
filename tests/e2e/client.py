"""Runs batches of requests against a service over its public gRPC API."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc

from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc

_OPTIONS = (("grpc.use_local_subchannel_pool", 1),)


async def complete_all(
    target: str, requests: Sequence[pb.GenerateRequest], concurrency: int
) -> list[pb.GenerateOnceResponse]:
    """The answers, in order, with at most `concurrency` requests open at once."""
    slots = asyncio.Semaphore(concurrency)
    async with grpc.aio.insecure_channel(target, options=_OPTIONS) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def complete(request: pb.GenerateRequest) -> pb.GenerateOnceResponse:
            async with slots:
                return await stub.GenerateOnce(request, timeout=240)

        return list(await asyncio.gather(*map(complete, requests)))


def tokens(responses: Sequence[pb.GenerateOnceResponse]) -> list[list[int]]:
    """The generated ids of each answer."""
    return [list(response.token_ids) for response in responses]
