"""What an API of the HTTP server consists of: endpoints and what answers them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from frontend.config import FrontendConfig
from frontend.generation.pipeline import GenerationPipeline
from frontend.http.body import Body
from frontend.http.openai.schemas.answers import ErrorAnswer
from frontend.metrics import FrontendMetrics

ERRORS_OF_BODIES = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)
ERRORS_OF_QUESTIONS = (400, 401, 500)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


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
        event_media_type: what a stream is.
        error: the model of its errors.
        errors: HTTP statuses of the errors it can answer.
        needs_key: whether an API key is asked for, where the server has some.
        needs_admin: whether it takes the key for administration, where the server has one.
        model_pattern: what the path parameter {model} matches, as a regular expression.
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
    event_media_type: str = "text/event-stream"
    error: type = ErrorAnswer
    errors: tuple[int, ...] = ERRORS_OF_QUESTIONS
    needs_key: bool = True
    needs_admin: bool = False
    model_pattern: str = ".+"

    @property
    def route(self) -> str:
        """The path as aiohttp's router takes it: names of models may have slashes in them."""
        return self.path.replace("{model}", f"{{model:{self.model_pattern}}}")


@dataclass(frozen=True, slots=True)
class Api:
    """The endpoints of one API.

    Attributes:
        endpoints: where they are, what they take and answer.
        handlers: makes what answers each endpoint, by the endpoint's name.
    """

    endpoints: Sequence[Endpoint]
    handlers: Callable[[FrontendConfig, GenerationPipeline, FrontendMetrics], Mapping[str, Handler]]
