"""The client for programs without an event loop."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any, Literal, Unpack, overload

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


class Client:
    """Blocking. Safe to use from several threads; close it, or use it as a context manager.

    Attributes:
        url: the address that it was given.
    """

    def __init__(
        self,
        url_or_target: str,
        api_key: str | None = None,
        *,
        tls: ClientTls | None = None,
        max_retries: int = 2,
    ) -> None:
        """Args:
        url_or_target: the server's gRPC address: "host:port", "unix:/path", "grpc://host:port" or, for TLS,
            "grpcs://host:port".
        api_key: sent with every call.
        tls: authorities to trust and a certificate to show, with either form of address.
        max_retries: how often a call is sent again, 0 to 4, that found no server (Unavailable) or a full one
            (Overloaded), after 0.25 s, 0.5 s and so on, each by up to a fifth shorter or longer, or when the
            server says. A stream is sent again only as long as nothing of it has come.

        Raises:
            ConfigError: the address is of another kind, a file of `tls` is wrong, or max_retries is out of
                range.
        """
        self.url = url_or_target
        self._channel = open_channel(grpc, url_or_target, tls, max_retries)
        self._stub = stub_of(self._channel)
        self._metadata = metadata_of(api_key)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; calls under way are cancelled."""
        self._channel.close()

    @overload
    def generate(
        self,
        prompt: str | None = None,
        sampling_params: Sampling | None = None,
        *,
        timeout: float | None = None,
        stream: Literal[False] = False,
        **fields: Unpack[RequestFields],
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: str | None = None,
        sampling_params: Sampling | None = None,
        *,
        timeout: float | None = None,
        stream: Literal[True],
        **fields: Unpack[RequestFields],
    ) -> Generator[Event, None, None]: ...

    def generate(
        self,
        prompt: str | None = None,
        sampling_params: Sampling | None = None,
        *,
        timeout: float | None = None,
        stream: bool = False,
        **fields: Unpack[RequestFields],
    ) -> Completion | Generator[Event, None, None]:
        """Generates a completion of a text, of token ids or of a conversation.

        Args:
            prompt: text to continue; or else give `token_ids` or `messages`.
            sampling_params: a field left at its default is left to the server, that is to the model's own.
            timeout: seconds until the request is ended with DeadlineExceeded.
            stream: whether to return an iterator of deltas. Closing it aborts the request.
            fields: see `RequestFields`.

        Raises:
            PagewireError: what the server answered (when streaming: on iteration).
        """
        request = generate_request(prompt, sampling_params, **fields)
        if stream:
            return self._deltas(request, timeout)
        response: Completion = self._call(self._stub.GenerateOnce, request, timeout)
        return response

    def events(
        self,
        prompt: str | None = None,
        sampling_params: Sampling | None = None,
        *,
        timeout: float | None = None,
        **fields: Unpack[RequestFields],
    ) -> Generator[inference_pb2.GenerateResponse, None, None]:
        """Streams everything that the server tells: besides the deltas the prompt, where it was asked for,
        the end of each of several completions, and the final counts. Takes what `generate` takes."""
        return self._events(generate_request(prompt, sampling_params, **fields), timeout)

    def _events(
        self, request: inference_pb2.GenerateRequest, timeout: float | None
    ) -> Generator[inference_pb2.GenerateResponse, None, None]:
        call = self._stub.Generate(request, timeout=timeout, metadata=self._metadata)
        try:
            with status_as_error():
                yield from call
        finally:
            call.cancel()

    def _deltas(
        self, request: inference_pb2.GenerateRequest, timeout: float | None
    ) -> Generator[Event, None, None]:
        with closing(self._events(request, timeout)) as events:
            for response in events:
                if response.HasField("delta"):
                    yield response.delta

    def list_models(self) -> list[Model]:
        """The models that requests may name."""
        response = self._call(self._stub.ListModels, inference_pb2.ListModelsRequest(), None)
        return list(response.models)

    def models(self) -> list[Model]:
        """The same as `list_models`."""
        return self.list_models()

    def embed(
        self,
        inputs: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        timeout: float | None = None,
        **fields: Unpack[EmbeddingFields],
    ) -> Vectors:
        """Turns texts, or lists of token ids, into vectors: [inputs, numbers of a vector], float32.

        Raises:
            PagewireError: what the server answered.
        """
        return vectors_of(self._call(self._stub.Embed, embed_request(inputs, fields), timeout))

    def classify(
        self,
        texts: str | Sequence[str],
        *,
        timeout: float | None = None,
        **fields: Unpack[ScoringFields],
    ) -> Classes:
        """Classifies texts, by a model with a classification head.

        Raises:
            PagewireError: what the server answered.
        """
        request = inference_pb2.ClassifyRequest(texts=listed(texts), **fields)
        response: Classes = self._call(self._stub.Classify, request, timeout)
        return response

    def score(
        self,
        queries: str | Sequence[str],
        documents: str | Sequence[str],
        *,
        timeout: float | None = None,
        **fields: Unpack[ScoringFields],
    ) -> list[float]:
        """How well each document goes with its query: one for all documents, or one for each.

        Raises:
            PagewireError: what the server answered.
        """
        request = inference_pb2.ScoreRequest(queries=listed(queries), documents=listed(documents), **fields)
        return list(self._call(self._stub.Score, request, timeout).scores)

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        **conversation: Unpack[ConversationFields],
    ) -> list[int]:
        """The token ids that `generate` would use for a text or a conversation."""
        request = tokenize_request(prompt, messages, conversation)
        response = self._call(self._stub.Tokenize, request, None)
        return list(response.token_ids)

    def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        """The answer of a call, which is cancelled where its caller is interrupted, as by Ctrl-C."""
        call = method.future(request, timeout=timeout, metadata=self._metadata)
        try:
            with status_as_error():
                return call.result()
        finally:
            call.cancel()
