"""A client of pagewire's gRPC for load: grpc.aio with the generated stubs, on a few connections of its own.

grpc.aio takes more processor time for a token than the HTTP client (docs/benchmarks.md has the figures), so
the load is spread over as many processes as it takes (generator.py).
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import grpc

from pagewire.base.errors import ConfigError, Unavailable
from pagewire.bench.serve.answer import Answer
from pagewire.bench.serve.certificate import shown_certificate
from pagewire.bench.serve.target import Target
from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc

_REASONS = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORT: "abort",
    pb.FINISH_REASON_TOOL_CALLS: "tool_calls",
}
_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # else all channels share one connection
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class GrpcClient:
    """Sends requests to one server. Make and use it in one event loop."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._metadata = tuple((name.lower(), value) for name, value in target.headers)
        self._channels: list[Any] = []
        self._stubs: list[inference_pb2_grpc.InferenceServiceStub] = []
        self._opening = asyncio.Lock()
        self._turn = 0
        target.tls()  # raises for a CA file that cannot be read

    async def models(self) -> list[str]:
        """The models that the server lists.

        Raises:
            ConfigError: it lists none, or does not let us see them.
            Unavailable: it cannot be reached.
        """
        failure, names = await self._list_models(await self._stub())
        if failure or not names:
            raise ConfigError(f"{self._target.url}: lists no models ({failure or 'there are none'})")
        return names

    async def prepare(self, connections: int) -> None:
        """Opens the connections that so many calls would use.

        Raises:
            Unavailable: the server cannot be reached.
        """
        await self._open()
        await asyncio.gather(*map(self._list_models, self._stubs[:connections]))

    def request(self, prompt: list[int] | str, max_tokens: int) -> pb.GenerateRequest:
        """What to give to `send`."""
        message = pb.GenerateRequest(model=self._target.model)
        if isinstance(prompt, str):
            message.text = prompt
        else:
            message.token_ids.ids.extend(prompt)
        message.sampling.max_tokens = max_tokens
        message.sampling.temperature = self._target.temperature
        message.sampling.ignore_eos = self._target.ignore_eos
        return message

    async def send(self, request: pb.GenerateRequest, answer: Answer) -> None:
        """Sends a request and fills the answer until it ends. Failures are written there, too."""
        answer.sent = time.perf_counter()
        try:
            async with asyncio.timeout(self._target.timeout):
                failure = await self._read(request, answer)
        except TimeoutError:
            failure = f"timeout: no end after {self._target.timeout:g} s"
        except Unavailable as error:
            failure = str(error)
        if failure:
            answer.fail(failure, time.perf_counter())
        elif math.isnan(answer.ended):
            answer.fail("the stream ended without a finished event", time.perf_counter())

    async def close(self) -> None:
        """Closes every connection."""
        for channel in self._channels:
            await channel.close()
        self._channels.clear()
        self._stubs.clear()

    async def _read(self, request: pb.GenerateRequest, answer: Answer) -> str:
        """Makes the call; returns why it failed, "" if it did not."""
        call = (await self._stub()).Generate(request, metadata=self._metadata)
        try:
            async for event in call:
                take(answer, event, time.perf_counter())
        except grpc.aio.AioRpcError as error:
            return _failure(error.code(), error.details())
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return _failure(grpc.StatusCode.CANCELLED, await call.details())  # the server's word, not ours
        return ""

    async def _list_models(self, stub: inference_pb2_grpc.InferenceServiceStub) -> tuple[str, list[str]]:
        """Why it was refused, and the models. Raises Unavailable where nobody answers."""
        try:
            answer = await stub.ListModels(
                pb.ListModelsRequest(), metadata=self._metadata, timeout=self._target.timeout
            )
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise Unavailable(f"{self._target.url}: cannot connect: {error.details()}") from error
            return _failure(error.code(), error.details()), []
        return "", [model.id for model in answer.models]

    async def _stub(self) -> inference_pb2_grpc.InferenceServiceStub:
        """The next connection's in turn."""
        if not self._stubs:
            await self._open()
        self._turn = (self._turn + 1) % len(self._stubs)
        return self._stubs[self._turn]

    async def _open(self) -> None:
        """Makes the channels, which connect when they are used."""
        async with self._opening:
            if self._stubs:
                return
            credentials, options = await asyncio.to_thread(_credentials, self._target)
            address = self._target.authority
            for _ in range(self._target.connections):
                if credentials is None:
                    channel = grpc.aio.insecure_channel(address, options=options)
                else:
                    channel = grpc.aio.secure_channel(address, credentials, options=options)
                self._channels.append(channel)
                self._stubs.append(inference_pb2_grpc.InferenceServiceStub(channel))  # type: ignore[no-untyped-call]


def take(answer: Answer, event: pb.GenerateResponse, now: float) -> None:
    """Takes an event of Generate that arrived at `now`."""
    kind = event.WhichOneof("event")
    if kind == "delta":
        delta = event.delta
        if delta.token_ids or delta.text or delta.reasoning:
            answer.times.append(now)
    elif kind == "finished":
        usage = event.finished.usage
        answer.prompt_tokens = usage.prompt_tokens
        answer.cached_tokens = usage.cached_tokens
        answer.output_tokens = usage.completion_tokens
        answer.finish_reason = _REASONS.get(event.finished.finish_reason, "")
        answer.ended = now


def _failure(code: grpc.StatusCode, details: str | None) -> str:
    return f"gRPC {code.name}: {details or ''}"[:200]


def _credentials(target: Target) -> tuple[Any, tuple[tuple[str, Any], ...]]:
    """A channel's credentials, None without TLS, and its options.

    Raises:
        Unavailable: the server's certificate is to be trusted as it is, and cannot be had.
    """
    if not target.uses_tls:
        return None, _OPTIONS
    if not target.insecure:
        authorities = target.ca_file.read_bytes() if target.ca_file else None
        return grpc.ssl_channel_credentials(authorities), _OPTIONS
    try:
        certificate, name = shown_certificate(target.host, target.port)
    except OSError as error:
        raise Unavailable(f"{target.url}: no certificate can be had from it: {error}") from error
    return grpc.ssl_channel_credentials(certificate), (*_OPTIONS, ("grpc.ssl_target_name_override", name))
