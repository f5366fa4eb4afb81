"""The client for asyncio."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from typing import Literal, Unpack, overload

import grpc

from pagewire.base.tls import ClientTls
from pagewire.client.channels import metadata_of, open_channel, status_as_error, stub_of
from pagewire.client.requests import (
    Classes,
    Completion,
    EmbeddingFields,
    Event,
    Model,
    RequestFields,
    Sampling,
    ScoringFields,
    Vectors,
    embed_request,
    generate_request,
    listed,
    tokenize_request,
    vectors_of,
)
from pagewire.inference.v1 import inference_pb2
from pagewire.wire.chat_messages import ConversationFields, Message


class AsyncClient:
    """The same for asyncio. Make and use it on one event loop."""

    def __init__(
        self,
        url_or_target: str,
        api_key: str | None = None,
        *,
        tls: ClientTls | None = None,
        max_retries: int = 2,
    ) -> None:
        """Takes what `Client` takes."""
        self._channel = open_channel(grpc.aio, url_or_target, tls, max_retries)
        self._stub = stub_of(self._channel)
        self._metadata = metadata_of(api_key)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; calls under way are cancelled."""
        await self._channel.close()

    @overload
    def generate(
        self,
        prompt: str | None = None,
        sampling_params: Sampling | None = None,
        *,
        timeout: float | None = None,
        stream: Literal[False] = False,
        **fields: Unpack[RequestFields],
    ) -> Awaitable[Completion]: ...

    @overload
    def generate(
        self,
        prompt: str | None = None,
        sampling_params: Sampling | None = None,
        *,
        timeout: float | None = None,
        stream: Literal[True],
        **fields: Unpack[RequestFields],
    ) -> AsyncGenerator[Event, None]: ...

    def generate(
        self,
        prompt: str | None = None,
        sampling_params: Sampling | None = None,
        *,
        timeout: float | None = None,
        stream: bool = False,
        **fields: Unpack[RequestFields],
    ) -> Awaitable[Completion] | AsyncGenerator[Event, None]:
        """As `Client.generate`, to be awaited or, with `stream`, iterated over. Cancelling the task or
        closing the iterator aborts the request."""
        request = generate_request(prompt, sampling_params, **fields)
        return self._deltas(request, timeout) if stream else self._whole(request, timeout)

    async def _whole(self, request: inference_pb2.GenerateRequest, timeout: float | None) -> Completion:
        with status_as_error():
            response: Completion = await self._stub.GenerateOnce(
                request, timeout=timeout, metadata=self._metadata
            )
            return response

    def events(
        self,
        prompt: str | None = None,
        sampling_params: Sampling | None = None,
        *,
        timeout: float | None = None,
        **fields: Unpack[RequestFields],
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """As `Client.events`."""
        return self._events(generate_request(prompt, sampling_params, **fields), timeout)

    async def _events(
        self, request: inference_pb2.GenerateRequest, timeout: float | None
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        call = self._stub.Generate(request, timeout=timeout, metadata=self._metadata)
        try:
            with status_as_error():
                async for response in call:
                    yield response
        finally:
            call.cancel()

    async def _deltas(
        self, request: inference_pb2.GenerateRequest, timeout: float | None
    ) -> AsyncGenerator[Event, None]:
        async with aclosing(self._events(request, timeout)) as events:
            async for response in events:
                if response.HasField("delta"):
                    yield response.delta

    async def list_models(self) -> list[Model]:
        """The models that requests may name."""
        with status_as_error():
            response = await self._stub.ListModels(inference_pb2.ListModelsRequest(), metadata=self._metadata)
            return list(response.models)

    async def models(self) -> list[Model]:
        """The same as `list_models`."""
        return await self.list_models()

    async def embed(
        self,
        inputs: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        timeout: float | None = None,
        **fields: Unpack[EmbeddingFields],
    ) -> Vectors:
        """As `Client.embed`."""
        request = embed_request(inputs, fields)
        with status_as_error():
            return vectors_of(await self._stub.Embed(request, timeout=timeout, metadata=self._metadata))

    async def classify(
        self,
        texts: str | Sequence[str],
        *,
        timeout: float | None = None,
        **fields: Unpack[ScoringFields],
    ) -> Classes:
        """As `Client.classify`."""
        request = inference_pb2.ClassifyRequest(texts=listed(texts), **fields)
        with status_as_error():
            response: Classes = await self._stub.Classify(request, timeout=timeout, metadata=self._metadata)
            return response

    async def score(
        self,
        queries: str | Sequence[str],
        documents: str | Sequence[str],
        *,
        timeout: float | None = None,
        **fields: Unpack[ScoringFields],
    ) -> list[float]:
        """As `Client.score`."""
        request = inference_pb2.ScoreRequest(queries=listed(queries), documents=listed(documents), **fields)
        with status_as_error():
            response = await self._stub.Score(request, timeout=timeout, metadata=self._metadata)
            return list(response.scores)

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        **conversation: Unpack[ConversationFields],
    ) -> list[int]:
        """The token ids that `generate` would use for a text or a conversation."""
        request = tokenize_request(prompt, messages, conversation)
        with status_as_error():
            response = await self._stub.Tokenize(request, metadata=self._metadata)
            return list(response.token_ids)
