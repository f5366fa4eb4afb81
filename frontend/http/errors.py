"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from aiohttp import web
from multidict import CIMultiDict

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


def error_body(error: PagewireError) -> dict[str, Any]:
    """The JSON object of an error."""
    _, kind, code = _shape(error)
    return _body(error.message, kind, error.param, code)


def error_response(error: PagewireError) -> web.Response:
    """The answer to a request that failed before anything was sent."""
    status, _, _ = _shape(error)
    headers = None
    if status in (429, 503) or error.retry_after is not None:
        seconds = 1 if error.retry_after is None else max(1, math.ceil(error.retry_after))
        headers = CIMultiDict({"Retry-After": str(seconds)})
    return web.json_response(error_body(error), status=status, headers=headers, dumps=_dumps)


def http_error_response(error: web.HTTPException) -> web.Response:
    """The answer where the HTTP layer itself refused the request: an unknown path, a wrong method, too
    large a body."""
    messages = {
        404: ("no such path; GET / lists the endpoints", "not_found"),
        405: (f"method not allowed; allowed: {error.headers.get('Allow', '')}", "method_not_allowed"),
        413: (error.text or "the request body is too large", "request_too_large"),
        417: ("the Expect header may only be 100-continue", "expectation_failed"),
    }
    message, code = messages.get(error.status, (error.text or error.reason, None))
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    response = error_object_response(error.status, message, kind, code)
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


def error_object_response(status: int, message: str, kind: str, code: str | None = None) -> web.Response:
    """An error of the HTTP layer's own."""
    return web.json_response(_body(message, kind, None, code), status=status, dumps=_dumps)


def _shape(error: PagewireError) -> tuple[int, str, str | None]:
    return _SHAPES.get(error.code, _SHAPES[Code.INTERNAL])


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    if len(message) > MAX_MESSAGE:
        message = message[: MAX_MESSAGE - 1] + "…"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
