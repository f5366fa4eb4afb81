"""ms-swift's client functions and classes, for a pagewire service: `from swift.llm import` becomes
`from pagewire.swift import`, and the lines below it stay.

    model_list = get_model_list_client()
    model_type = model_list.data[0].id
    request_config = RequestConfig(seed=42)
    resp = inference_client(model_type, "Where is the capital of Zhejiang?", request_config=request_config)
    print(resp.choices[0].message.content)

They speak HTTP, to port 8000 of this machine unless told otherwise. Errors are those of
`pagewire.base.errors`.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from frontend.http.openai.schemas.answers import ChatCompletion, ChatCompletionChunk
from frontend.http.operations.answers import ModelList
from pagewire.base.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    PagewireError,
    Unauthenticated,
    Unavailable,
)
from pagewire.wire.query_history import to_messages

MAX_AT_ONCE = 64
"""Requests that `InferClient.infer` sends at a time; the server batches them."""

_ERRORS = {
    400: InvalidRequest,
    401: Unauthenticated,
    404: NotFound,
    408: DeadlineExceeded,
    429: Overloaded,
    503: Unavailable,
}


@dataclass(kw_only=True)
class RequestConfig:
    """How to sample. None leaves a field to the model's own default.

    Attributes:
        max_tokens: the most tokens to generate.
        temperature: divides the logits; 0 is greedy.
        top_k: keeps this many of the likeliest tokens.
        top_p: keeps the likeliest tokens that together have this probability.
        repetition_penalty: divides the logits of tokens that are there already.
        presence_penalty, frequency_penalty: subtracted from the logits of tokens that were generated already.
        stop: texts that end the answer.
        seed: makes sampling reproducible.
        n: how many answers.
        logprobs: whether log probabilities are returned.
        top_logprobs: of how many of the likeliest tokens.
        stream: whether the answer comes in pieces.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: list[str] | None = None
    seed: int | None = None
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    stream: bool = False


XRequestConfig = RequestConfig
"""Its name in ms-swift 2."""


@dataclass(kw_only=True)
class InferRequest:
    """A conversation to answer, as OpenAI's API writes it.

    Attributes:
        messages: the turns, each {"role": ..., "content": ...}.
        tools: functions that the model may call.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None


class InferClient:
    """Asks a running service, many requests at once. It holds no connection open between calls."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int | str = 8000,
        api_key: str | None = None,
        *,
        base_url: str | None = None,
        timeout: float | None = None,
    ) -> None:
        """Args:
        host, port: where the service answers HTTP.
        api_key: sent with every request.
        base_url: such as "https://models.example.org/v1", instead of host and port.
        timeout: seconds that the server may be silent.

        Raises:
            ConfigError: base_url is no HTTP address.
        """
        self.base_url = (base_url or f"http://{host}:{port}/v1").rstrip("/")
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"base_url is {base_url!r}; it must be such as http://localhost:8000/v1", param="base_url"
            )
        self._url = parts
        self._timeout = timeout
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def get_model_list(self) -> ModelList:
        """The models that requests may name.

        Raises:
            PagewireError: what the server answered.
        """
        return ModelList.model_validate_json(self._whole("GET", "models", None))

    @cached_property
    def models(self) -> list[str]:
        """Their names."""
        return [model.id for model in self.get_model_list().data]

    def infer(
        self,
        infer_requests: Sequence[InferRequest],
        request_config: RequestConfig | None = None,
        *,
        model: str | None = None,
    ) -> list[ChatCompletion] | list[Iterator[ChatCompletionChunk]]:
        """Answers conversations, up to MAX_AT_ONCE at a time.

        Args:
            infer_requests: the conversations.
            request_config: how to sample; with `stream` an iterator of pieces is returned for each
                conversation, which is asked for when it is first read.
            model: one of `models`, by default the only one.

        Raises:
            InvalidRequest: there are several models, and none was named.
            PagewireError: what the server answered; with `stream`, on iteration.
        """
        config = request_config or RequestConfig()
        name = self._only_model() if model is None else model
        bodies = [_body(name, request, config) for request in infer_requests]
        if config.stream:
            return [self._chunks(body) for body in bodies]
        with ThreadPoolExecutor(MAX_AT_ONCE) as threads:
            return list(threads.map(self._answer, bodies))

    def _only_model(self) -> str:
        if len(self.models) != 1:
            raise InvalidRequest(
                f"the server has several models; give model=, one of {', '.join(self.models)}", param="model"
            )
        return self.models[0]

    def _answer(self, body: Mapping[str, Any]) -> ChatCompletion:
        return ChatCompletion.model_validate_json(self._whole("POST", "chat/completions", body))

    def _chunks(self, body: Mapping[str, Any]) -> Iterator[ChatCompletionChunk]:
        connection = self._connection()
        with closing(connection):
            for line in self._sent(connection, "POST", "chat/completions", body):
                data = line.decode().strip()
                if data == "data: [DONE]":
                    return
                if data.startswith("data: "):
                    event = json.loads(data.removeprefix("data: "))
                    if "error" in event:
                        raise PagewireError(event["error"]["message"])
                    chunk = ChatCompletionChunk.model_validate(event)
                    for choice in chunk.choices:
                        choice.delta.content = (
                            choice.delta.content or ""
                        )  # ms-swift's programs print it as it is
                    yield chunk

    def _whole(self, method: str, path: str, body: Mapping[str, Any] | None) -> bytes:
        connection = self._connection()
        with closing(connection):
            return self._sent(connection, method, path, body).read()

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        return kind(self._url.hostname or "", self._url.port, timeout=self._timeout)

    def _sent(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
    ) -> http.client.HTTPResponse:
        """The response to a request, its body still to be read."""
        data = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        try:
            connection.request(method, f"{self._url.path}/{path}", data, self._headers)
            response = connection.getresponse()
        except OSError as error:
            raise Unavailable(
                f"no server answers at {self.base_url} ({error}); `pagewire serve MODEL` starts one"
            ) from error
        if response.status != 200:
            raise _error(response.status, response.read())
        return response


def get_model_list_client(
    host: str = "127.0.0.1", port: int | str = 8000, *, api_key: str | None = None
) -> ModelList:
    """The models of the service at host and port: `.data[0].id` is the name of the first.

    Raises:
        PagewireError: what the server answered.
    """
    return InferClient(host, port, api_key).get_model_list()


def inference_client(
    model_type: str,
    query: str,
    history: Sequence[Sequence[str]] | None = None,
    system: str | None = None,
    *,
    request_config: RequestConfig | None = None,
    host: str = "127.0.0.1",
    port: int | str = 8000,
    api_key: str | None = None,
) -> ChatCompletion | Iterator[ChatCompletionChunk]:
    """Answers a query that brings its history.

    Args:
        model_type: the model's name.
        query: what the user says.
        history: [query, response] of each turn before, oldest first.
        system: what the model is told first.
        request_config: how to sample.
        host, port: where the service answers HTTP.
        api_key: sent with the request.

    Returns:
        An answer, whose text is `.choices[0].message.content`; with `request_config.stream` an iterator of
        pieces, whose text is `.choices[0].delta.content`.

    Raises:
        PagewireError: what the server answered; with `stream`, on iteration.
    """
    messages = to_messages({"query": query, "history": history, "system": system})
    client = InferClient(host, port, api_key)
    [answer] = client.infer([InferRequest(messages=messages)], request_config, model=model_type)
    return answer


def _body(model: str, request: InferRequest, config: RequestConfig) -> dict[str, Any]:
    fields = {"model": model, **asdict(request), **asdict(config)}
    return {name: value for name, value in fields.items() if value is not None}


def _error(status: int, body: bytes) -> PagewireError:
    """What an answer that is no success says."""
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"the server answered {status}: {body[:200].decode(errors='replace')}"
    return _ERRORS.get(status, PagewireError)(message)
