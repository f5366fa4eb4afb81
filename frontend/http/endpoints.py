"""Every HTTP endpoint: where it is, what it takes and answers. Routes and /openapi.json come from here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from frontend.http.schemas import answers
from frontend.http.schemas.base import Body
from frontend.http.schemas.chat import ChatCompletionBody
from frontend.http.schemas.completion import CompletionBody
from frontend.http.schemas.embeddings import EmbeddingBody
from frontend.http.schemas.responses import ResponsesBody
from frontend.http.schemas.text import DetokenizeBody, TokenizeBody

_OF_BODIES = (400, 401, 404, 408, 413, 429, 500, 503)
_OF_QUESTIONS = (400, 401, 500)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One method of one path.

    Attributes:
        name: its operation id.
        method, path: path parameters in braces.
        tag: the group it belongs to.
        summary, description: for people.
        body: the model of the request's body, None for no body.
        example: a body to begin with.
        answer: the model of the answer, None if it is no JSON.
        media_type: what the answer is instead.
        event: the model of a stream's events, None if it does not stream.
        errors: HTTP statuses of the errors it can answer.
        needs_key: whether an API key is asked for, where the server has some.
    """

    name: str
    method: str
    path: str
    tag: str
    summary: str
    description: str = ""
    body: type[Body] | None = None
    example: Mapping[str, Any] = field(default_factory=dict)
    answer: Any = None
    media_type: str = "application/json"
    event: Any = None
    errors: tuple[int, ...] = _OF_QUESTIONS
    needs_key: bool = True

    @property
    def route(self) -> str:
        """The path as aiohttp's router takes it: names of models may have slashes in them."""
        return self.path.replace("{id}", "{id:.+}") if self.path == "/v1/models/{id}" else self.path


_HELLO = [{"role": "user", "content": "What is the capital of France?"}]

_NOT_STORED = "Always answers 404: this server stores no responses."

ENDPOINTS = (
    Endpoint(
        name="createChatCompletion",
        method="POST",
        path="/v1/chat/completions",
        tag="Generation",
        summary="Continue a conversation",
        body=ChatCompletionBody,
        example={"messages": _HELLO, "max_tokens": 64},
        answer=answers.ChatCompletion,
        event=answers.ChatCompletionChunk,
        errors=_OF_BODIES,
    ),
    Endpoint(
        name="createCompletion",
        method="POST",
        path="/v1/completions",
        tag="Generation",
        summary="Continue texts or token ids",
        body=CompletionBody,
        example={"prompt": "The capital of France is", "max_tokens": 16},
        answer=answers.TextCompletion,
        event=answers.TextCompletion,
        errors=_OF_BODIES,
    ),
    Endpoint(
        name="createResponse",
        method="POST",
        path="/v1/responses",
        tag="Generation",
        summary="Answer an input of items",
        description="OpenAI's Responses API with nothing stored: each request has the whole conversation.",
        body=ResponsesBody,
        example={"input": "What is the capital of France?", "max_output_tokens": 64},
        answer=answers.ResponseAnswer,
        event=answers.ResponseEvent,
        errors=_OF_BODIES,
    ),
    Endpoint(
        name="getResponse",
        method="GET",
        path="/v1/responses/{id}",
        tag="Generation",
        summary="Get a stored response",
        description=_NOT_STORED,
        errors=(400, 401, 404),
    ),
    Endpoint(
        name="deleteResponse",
        method="DELETE",
        path="/v1/responses/{id}",
        tag="Generation",
        summary="Delete a stored response",
        description=_NOT_STORED,
        errors=(400, 401, 404),
    ),
    Endpoint(
        name="createEmbedding",
        method="POST",
        path="/v1/embeddings",
        tag="Embeddings",
        summary="Turn inputs into vectors",
        description="From the model's hidden states: as the model was made for it, or as `pooling` says.",
        body=EmbeddingBody,
        example={"input": ["first text", "second text"], "pooling": "mean"},
        answer=answers.EmbeddingList,
        errors=_OF_BODIES,
    ),
    Endpoint(
        name="listModels",
        method="GET",
        path="/v1/models",
        tag="Models",
        summary="List the served models",
        answer=answers.ModelList,
    ),
    Endpoint(
        name="getModel",
        method="GET",
        path="/v1/models/{id}",
        tag="Models",
        summary="Tell of one served model",
        answer=answers.ModelAnswer,
        errors=(*_OF_QUESTIONS, 404),
    ),
    Endpoint(
        name="tokenize",
        method="POST",
        path="/tokenize",
        tag="Text",
        summary="Turn text or a conversation into token ids",
        body=TokenizeBody,
        example={"prompt": "The capital of France is"},
        answer=answers.TokenizeAnswer,
        errors=_OF_BODIES,
    ),
    Endpoint(
        name="detokenize",
        method="POST",
        path="/detokenize",
        tag="Text",
        summary="Turn token ids into text",
        body=DetokenizeBody,
        example={"tokens": [504, 3575, 282]},
        answer=answers.DetokenizeAnswer,
        errors=_OF_BODIES,
    ),
    Endpoint(
        name="health",
        method="GET",
        path="/health",
        tag="Operation",
        summary="The process lives",
        answer=answers.StatusAnswer,
        errors=(400,),
        needs_key=False,
    ),
    Endpoint(
        name="ping",
        method="GET",
        path="/ping",
        tag="Operation",
        summary="The process lives, by another name",
        answer=answers.StatusAnswer,
        errors=(400,),
        needs_key=False,
    ),
    Endpoint(
        name="ready",
        method="GET",
        path="/ready",
        tag="Operation",
        summary="A request sent now would be served",
        answer=answers.StatusAnswer,
        errors=(400, 503),
        needs_key=False,
    ),
    Endpoint(
        name="load",
        method="GET",
        path="/load",
        tag="Operation",
        summary="How busy the scheduler is",
        answer=answers.LoadAnswer,
        errors=(*_OF_QUESTIONS, 503),
    ),
    Endpoint(
        name="metrics",
        method="GET",
        path="/metrics",
        tag="Operation",
        summary="Prometheus metrics",
        media_type="text/plain",
    ),
    Endpoint(
        name="version",
        method="GET",
        path="/version",
        tag="Operation",
        summary="The server's version",
        answer=answers.VersionAnswer,
        errors=(400,),
        needs_key=False,
    ),
    Endpoint(
        name="serverInfo",
        method="GET",
        path="/server_info",
        tag="Operation",
        summary="The model, the engine and the limits in force",
        answer=answers.ServerInfo,
    ),
    Endpoint(
        name="openapi",
        method="GET",
        path="/openapi.json",
        tag="Documentation",
        summary="This document",
        answer=dict[str, Any],
        errors=(400,),
        needs_key=False,
    ),
    Endpoint(
        name="docs",
        method="GET",
        path="/docs",
        tag="Documentation",
        summary="This document, for people",
        media_type="text/html",
        errors=(400,),
        needs_key=False,
    ),
    Endpoint(
        name="index",
        method="GET",
        path="/",
        tag="Documentation",
        summary="A front page",
        media_type="text/html",
        errors=(400,),
        needs_key=False,
    ),
)
