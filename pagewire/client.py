"""Clients of the public gRPC service, for programs that want more than OpenAI's API and less than stubs.

    with Client("127.0.0.1:50051") as client:
        print(client.generate("The capital of France is", SamplingParams(max_tokens=8)).text)
        for event in client.generate(messages=[{"role": "user", "content": "Hi"}], stream=True):
            print(event.text, end="", flush=True)

Errors are those of `pagewire.base.errors`, by the status the server answered.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing, contextmanager
from typing import Any, Literal, TypedDict, Unpack, overload

import grpc

from pagewire.base.errors import ConfigError, InvalidRequest, PagewireError, from_code
from pagewire.base.tls import ClientTls
from pagewire.inference.v1 import inference_pb2, inference_pb2_grpc
from pagewire.wire.chat_messages import ConversationFields, Message, to_chat_messages
from pagewire.wire.sampling_messages import to_message
from pagewire.wire.sampling_params import SamplingParams

Completion = inference_pb2.GenerateOnceResponse
"""A whole completion: `request_id`, `token_ids`, `text`, `logprobs` and `finished` (reason and usage). Where
there are several they are in `choices`; `prompt` is there if it was asked for."""

Event = inference_pb2.Delta
"""A piece of a streamed completion: `token_ids`, `text`, `logprobs` and `usage` so far, and the `index` of
the completion that it belongs to."""

Classes = inference_pb2.ClassifyResponse
"""The names of the classes (`labels`), and for each text the likeliest (`label`) and a number for each
(`probs`), in `classifications`."""

_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Each client has a connection of its own, so that several spread over frontends that share a port.
    ("grpc.use_local_subchannel_pool", 1),
)

Sampling = SamplingParams | Mapping[str, Any]
"""SamplingParams decide every field; a mapping of some of its fields leaves the others to the model's own
defaults (generation_config.json), as does None for all of them."""


class RequestFields(ConversationFields, total=False):
    """What a request may have besides a text prompt and sampling parameters.

    token_ids: the prompt as token ids. messages: the prompt as a conversation, as OpenAI's API writes it; see
    `chat_wire.Message`, and `ConversationFields` for what goes with it. model: one of `models()`; empty means
    the server's only one. request_id: a name for logs.
    priority: lower goes first. user: the caller's end user, with whom it shares fairly what it gets.
    cache_salt: cached prefixes are shared only with requests of the same one.
    truncate_prompt_tokens: keeps this many tokens at the prompt's end. echo: returns the prompt too.
    """

    token_ids: Sequence[int]
    messages: Sequence[Message]
    model: str
    request_id: str
    priority: int
    user: str
    cache_salt: str
    truncate_prompt_tokens: int
    echo: bool


class ScoringFields(TypedDict, total=False):
    """What a request to classify or score may have besides its texts.

    use_activation: false for the logits instead of probabilities or scores. truncate_prompt_tokens: keeps
    this many tokens of each input, from its beginning. The others are those of `RequestFields`.
    """

    use_activation: bool
    truncate_prompt_tokens: int
    model: str
    request_id: str
    priority: int
    user: str


class Client:
    """Blocking. Safe to use from several threads; close it, or use it as a context manager."""

    def __init__(
        self, url_or_target: str, api_key: str | None = None, *, tls: ClientTls | None = None
    ) -> None:
        """Args:
        url_or_target: the server's gRPC address: "host:port", "unix:/path", "grpc://host:port" or, for TLS,
            "grpcs://host:port".
        api_key: sent with every call.
        tls: authorities to trust and a certificate to show, with either form of address.

        Raises:
            ConfigError: the address is of another kind, or a file of `tls` is wrong.
        """
        self._channel = _channel(grpc, url_or_target, tls)
        self._stub = _stub(self._channel)
        self._metadata = _metadata(api_key)

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
    ) -> Iterator[Event]: ...

    def generate(
        self,
        prompt: str | None = None,
        sampling_params: Sampling | None = None,
        *,
        timeout: float | None = None,
        stream: bool = False,
        **fields: Unpack[RequestFields],
    ) -> Completion | Iterator[Event]:
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
        request = _request(prompt, sampling_params, **fields)
        if stream:
            return self._deltas(request, timeout)
        with _status_as_error():
            response: Completion = self._stub.GenerateOnce(request, timeout=timeout, metadata=self._metadata)
            return response

    def events(
        self,
        prompt: str | None = None,
        sampling_params: Sampling | None = None,
        *,
        timeout: float | None = None,
        **fields: Unpack[RequestFields],
    ) -> Iterator[inference_pb2.GenerateResponse]:
        """Streams everything that the server tells: besides the deltas the prompt, where it was asked for,
        the end of each of several completions, and the final counts. Takes what `generate` takes."""
        return self._events(_request(prompt, sampling_params, **fields), timeout)

    def _events(
        self, request: inference_pb2.GenerateRequest, timeout: float | None
    ) -> Generator[inference_pb2.GenerateResponse, None, None]:
        call = self._stub.Generate(request, timeout=timeout, metadata=self._metadata)
        try:
            with _status_as_error():
                yield from call
        finally:
            call.cancel()

    def _deltas(self, request: inference_pb2.GenerateRequest, timeout: float | None) -> Iterator[Event]:
        with closing(self._events(request, timeout)) as events:
            for response in events:
                if response.HasField("delta"):
                    yield response.delta

    def models(self) -> list[inference_pb2.Model]:
        """The models that requests may name."""
        with _status_as_error():
            response = self._stub.ListModels(inference_pb2.ListModelsRequest(), metadata=self._metadata)
            return list(response.models)

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
        request = inference_pb2.ClassifyRequest(texts=_listed(texts), **fields)
        with _status_as_error():
            response: Classes = self._stub.Classify(request, timeout=timeout, metadata=self._metadata)
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
        request = inference_pb2.ScoreRequest(queries=_listed(queries), documents=_listed(documents), **fields)
        with _status_as_error():
            return list(self._stub.Score(request, timeout=timeout, metadata=self._metadata).scores)

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        **conversation: Unpack[ConversationFields],
    ) -> list[int]:
        """The token ids that `generate` would use for a text or a conversation."""
        request = _tokenize_request(prompt, messages, conversation)
        with _status_as_error():
            response = self._stub.Tokenize(request, metadata=self._metadata)
            return list(response.token_ids)


class AsyncClient:
    """The same for asyncio. Make and use it on one event loop."""

    def __init__(
        self, url_or_target: str, api_key: str | None = None, *, tls: ClientTls | None = None
    ) -> None:
        """Takes what `Client` takes."""
        self._channel = _channel(grpc.aio, url_or_target, tls)
        self._stub = _stub(self._channel)
        self._metadata = _metadata(api_key)

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
        request = _request(prompt, sampling_params, **fields)
        return self._deltas(request, timeout) if stream else self._whole(request, timeout)

    async def _whole(self, request: inference_pb2.GenerateRequest, timeout: float | None) -> Completion:
        with _status_as_error():
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
        return self._events(_request(prompt, sampling_params, **fields), timeout)

    async def _events(
        self, request: inference_pb2.GenerateRequest, timeout: float | None
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        call = self._stub.Generate(request, timeout=timeout, metadata=self._metadata)
        try:
            with _status_as_error():
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

    async def models(self) -> list[inference_pb2.Model]:
        """The models that requests may name."""
        with _status_as_error():
            response = await self._stub.ListModels(inference_pb2.ListModelsRequest(), metadata=self._metadata)
            return list(response.models)

    async def classify(
        self,
        texts: str | Sequence[str],
        *,
        timeout: float | None = None,
        **fields: Unpack[ScoringFields],
    ) -> Classes:
        """As `Client.classify`."""
        request = inference_pb2.ClassifyRequest(texts=_listed(texts), **fields)
        with _status_as_error():
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
        request = inference_pb2.ScoreRequest(queries=_listed(queries), documents=_listed(documents), **fields)
        with _status_as_error():
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
        request = _tokenize_request(prompt, messages, conversation)
        with _status_as_error():
            response = await self._stub.Tokenize(request, metadata=self._metadata)
            return list(response.token_ids)


def _target(url_or_target: str) -> str:
    if url_or_target.startswith(("http://", "https://")):
        raise ConfigError(
            f"{url_or_target} is an HTTP address; give the server's gRPC address, such as 127.0.0.1:50051"
        )
    return url_or_target.removeprefix("grpc://").removeprefix("grpcs://").rstrip("/")


def _channel(library: Any, url_or_target: str, tls: ClientTls | None) -> Any:
    """A channel of grpc or grpc.aio."""
    if tls is None and url_or_target.startswith("grpcs://"):
        tls = ClientTls()
    if tls is None:
        return library.insecure_channel(_target(url_or_target), options=_OPTIONS)
    return library.secure_channel(_target(url_or_target), tls.credentials(), options=_OPTIONS)


def _stub(channel: Any) -> inference_pb2_grpc.InferenceServiceStub:
    return inference_pb2_grpc.InferenceServiceStub(channel)  # type: ignore[no-untyped-call]


def _metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)


def _request(
    prompt: str | None,
    sampling_params: Sampling | None,
    *,
    token_ids: Sequence[int] | None = None,
    messages: Sequence[Message] | None = None,
    model: str = "",
    request_id: str = "",
    priority: int = 0,
    user: str = "",
    cache_salt: str = "",
    truncate_prompt_tokens: int | None = None,
    echo: bool = False,
    **conversation: Unpack[ConversationFields],
) -> inference_pb2.GenerateRequest:
    if [prompt, token_ids, messages].count(None) != 2:
        raise InvalidRequest("give exactly one of prompt, token_ids and messages", param="prompt")
    _check_conversation(messages, conversation)
    request = inference_pb2.GenerateRequest(
        model=model,
        request_id=request_id,
        priority=priority,
        user=user,
        cache_salt=cache_salt,
        truncate_prompt_tokens=truncate_prompt_tokens,
        echo=echo,
    )
    if prompt is not None:
        request.text = prompt
    elif token_ids is not None:
        request.token_ids.ids.extend(token_ids)
        request.token_ids.SetInParent()
    else:
        request.messages.CopyFrom(to_chat_messages(messages or (), **conversation))
    if sampling_params is not None:
        request.sampling.CopyFrom(_sampling(sampling_params))
    return request


def _listed(texts: str | Sequence[str]) -> Sequence[str]:
    return [texts] if isinstance(texts, str) else texts


def _tokenize_request(
    prompt: str | None, messages: Sequence[Message] | None, conversation: ConversationFields
) -> inference_pb2.TokenizeRequest:
    if (prompt is None) == (messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    _check_conversation(messages, conversation)
    if messages is None:
        return inference_pb2.TokenizeRequest(text=prompt)
    return inference_pb2.TokenizeRequest(messages=to_chat_messages(messages, **conversation))


def _check_conversation(messages: Sequence[Message] | None, conversation: ConversationFields) -> None:
    """Refuses what would be lost, and what is misspelt."""
    for field in conversation:
        if field not in ConversationFields.__annotations__:
            raise InvalidRequest(f"{field} is not known; see RequestFields for what is", param=field)
        if messages is None:
            raise InvalidRequest(f"{field} is for conversations; give messages with it", param=field)


def _sampling(sampling: Sampling) -> inference_pb2.SamplingParams:
    params = sampling if isinstance(sampling, SamplingParams) else SamplingParams(**sampling)
    return to_message(params, None if isinstance(sampling, SamplingParams) else sampling)


@contextmanager
def _status_as_error() -> Iterator[None]:
    """Raises the status that ended a call as this package's error."""
    try:
        yield
    except grpc.RpcError as error:
        status = error.code()
        metadata = dict([*(error.trailing_metadata() or ())])  # pairs, though it may look like a mapping
        seconds = metadata.get("retry-after")
        raised: PagewireError = from_code(
            status.value[0],
            error.details() or status.name,
            param=metadata.get("x-param"),
            retry_after=None if seconds is None else float(seconds),
        )
        raise raised from error
