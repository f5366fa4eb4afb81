"""A client that does not read costs bounded memory, disturbs nobody, and is not kept for ever."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import httpx
import psutil
import pytest

from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from tests.e2e.test_lifecycle import until_idle
from tools.service import Service

MANY_TOKENS = 100_000
NUM_CHOICES = 8  # of the HTTP request, so that it fills the system's buffers sooner
STALL_SECONDS = 2
GIVEN_UP = "the client took nothing"
NUM_OTHERS, OTHERS_TOKENS = 20, 200
# A token id takes some 36 bytes in the frontend; all that was rendered of so many tokens would be 25 MB.
MOST_BYTES = 12 << 20


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Iterator[Service]:
    """As fast as it can be, and giving up clients after seconds."""
    options = ("--engine", "null", "--max-model-len", "131072", "--stall-timeout", str(STALL_SECONDS))
    with Service(tmp_path_factory.mktemp("slow"), options=options) as running:
        yield running


@contextmanager
def silent_http_client(service: Service) -> Iterator[socket.socket]:
    """Asks for a long stream and reads nothing of it."""
    host, port = service.http_url.removeprefix("http://").split(":")
    asked = {"prompt": "Once", "n": NUM_CHOICES, "max_tokens": MANY_TOKENS // NUM_CHOICES, "stream": True}
    body = json.dumps(asked).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        yield client


@contextmanager
def silent_grpc_client(service: Service) -> Iterator[grpc.Call]:
    """Asks for a long stream and reads one message of it. The library reads ahead as far as it offers room by
    flow control: of a fixed size here, as otherwise it offers megabytes where the server is near."""
    with grpc.insecure_channel(service.grpc_target, options=(("grpc.http2.bdp_probe", 0),)) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = pb.GenerateRequest(text="Once", sampling=pb.SamplingParams(max_tokens=MANY_TOKENS))
        call = stub.Generate(request)
        next(call)
        yield call


async def stream(client: httpx.AsyncClient, service: Service) -> int:
    """The tokens of one stream that is read as it comes."""
    body = {"prompt": "Once", "max_tokens": OTHERS_TOKENS, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    async with client.stream("POST", f"{service.http_url}/v1/completions", json=body) as response:
        lines = [line async for line in response.aiter_lines() if line.startswith("data: {")]
    return int(json.loads(lines[-1][6:])["usage"]["completion_tokens"])


def frontend_open_requests(service: Service) -> float:
    metrics = service.metrics()
    return next(
        value for name, value in metrics.items() if name.startswith("pagewire:frontend_open_requests")
    )


@pytest.mark.parametrize("silent_client", [silent_http_client, silent_grpc_client])
async def test_a_client_that_never_reads_disturbs_nobody_and_is_given_up(
    service: Service, silent_client: object
) -> None:
    frontend: psutil.Process = service.processes()["frontend"]
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=NUM_OTHERS)) as client:
        await asyncio.gather(*(stream(client, service) for _ in range(NUM_OTHERS)))  # warm
        before, given_up = frontend.memory_info().rss, service.log.count(GIVEN_UP)
        with silent_client(service):  # type: ignore[operator]
            counts = await asyncio.gather(*(stream(client, service) for _ in range(NUM_OTHERS)))
            assert counts == [OTHERS_TOKENS] * NUM_OTHERS
            peak, deadline = 0, time.monotonic() + 30
            while service.log.count(GIVEN_UP) == given_up:
                peak = max(peak, frontend.memory_info().rss)
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
            await until_idle(service)
            assert peak - before < MOST_BYTES
            assert frontend_open_requests(service) == 0
