"""Why a request is not served, before an API gives it its form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from aiohttp import web

from pagewire.base.errors import Code, PagewireError

MAX_MESSAGE = 2000
"""Characters. Messages quote what the client sent, which may be large."""

_SHAPES: Mapping[int, tuple[int, str, str | None]] = {
    # code: HTTP status, OpenAI's error type, OpenAI's error code
    Code.INVALID_ARGUMENT: (400, "invalid_request_error", None),
    Code.UNAUTHENTICATED: (401, "authentication_error", "invalid_api_key"),
    Code.NOT_FOUND: (404, "invalid_request_error", "model_not_found"),
    Code.UNIMPLEMENTED: (400, "invalid_request_error", "unsupported_parameter"),
    Code.RESOURCE_EXHAUSTED: (429, "rate_limit_error", "server_overloaded"),
    Code.UNAVAILABLE: (503, "service_unavailable_error", "engine_unavailable"),
    Code.DEADLINE_EXCEEDED: (408, "timeout_error", "deadline_exceeded"),
    Code.INTERNAL: (500, "server_error", None),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What the forms of all APIs are made from.

    Attributes:
        status: the HTTP status, as OpenAI's API has it.
        message: for people: what was wrong, what is allowed, what to do.
        kind: OpenAI's error type.
        code: OpenAI's error code, or more precisely what happened.
        param: the field at fault, if one is.
        retry_after: whole seconds after which the same request may be taken, where that can be said.
        allow: the methods that the path takes, where the method was wrong.
        request_id: of which request, for the APIs that say so in an error's body.
        accept_encoding: the codings that a body may have, where it had another.
    """

    status: int
    message: str
    kind: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    retry_after: int | None = None
    allow: str | None = None
    request_id: str | None = None
    accept_encoding: str | None = None

    def __post_init__(self) -> None:
        if len(self.message) > MAX_MESSAGE:
            object.__setattr__(self, "message", self.message[: MAX_MESSAGE - 1] + "…")

    def of_request(self, request_id: str | None) -> Failure:
        """The same, told of a request."""
        return replace(self, request_id=request_id)

    @classmethod
    def of(cls, error: PagewireError) -> Failure:
        """Of an error that the pipeline raised."""
        status, kind, code = _SHAPES.get(error.code, _SHAPES[Code.INTERNAL])
        retry_after = None
        if status in (429, 503) or error.retry_after is not None:
            retry_after = 1 if error.retry_after is None else max(1, math.ceil(error.retry_after))
        return cls(
            status=status,
            message=error.message,
            kind=kind,
            code=code,
            param=error.param,
            retry_after=retry_after,
        )

    @classmethod
    def of_http(cls, error: web.HTTPException) -> Failure:
        """Where the HTTP layer itself refused the request: an unknown path, a wrong method, too large a
        body."""
        allow = error.headers.get("Allow")
        messages = {
            404: ("no such path; GET / lists the endpoints", "not_found"),
            405: (f"method not allowed; allowed: {allow or ''}", "method_not_allowed"),
            413: (error.text or "the request body is too large", "request_too_large"),
            417: ("the Expect header may only be 100-continue", "expectation_failed"),
        }
        message, code = messages.get(error.status, (error.text or error.reason, None))
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        return cls(status=error.status, message=message, kind=kind, code=code, allow=allow)


class ErrorForm(Protocol):
    """How an API's errors look."""

    def status(self, failure: Failure) -> int:
        """The HTTP status."""

    def body(self, failure: Failure) -> Mapping[str, Any]:
        """The JSON object."""
