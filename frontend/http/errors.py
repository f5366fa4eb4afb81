"""Errors as responses, each in the form of the API that its path belongs to."""

from __future__ import annotations

from aiohttp import web

from frontend.http.anthropic.errors import ANTHROPIC_ERRORS
from frontend.http.failure import ErrorForm, Failure
from frontend.http.json_text import json_response
from frontend.http.ollama.errors import OLLAMA_ERRORS
from frontend.http.openai.errors import OPENAI_ERRORS
from frontend.http.triton.errors import TRITON_ERRORS
from pagewire.base.errors import PagewireError

_FORMS: tuple[tuple[str, ErrorForm], ...] = (
    ("/v1/messages", ANTHROPIC_ERRORS),
    ("/api", OLLAMA_ERRORS),
    ("/v2", TRITON_ERRORS),
)
"""By the beginnings of their paths, the more special ones first."""


def error_form(path: str) -> ErrorForm:
    """The form of errors of a path, whether there is such a path or not."""
    for prefix, form in _FORMS:
        if path == prefix or path.startswith(prefix + "/"):
            return form
    return OPENAI_ERRORS


def error_response(path: str, error: PagewireError | Failure, request_id: str | None = None) -> web.Response:
    """The answer to a request that failed before anything was sent."""
    failure = error if isinstance(error, Failure) else Failure.of(error)
    failure = failure.of_request(request_id)
    form = error_form(path)
    response = json_response(dict(form.body(failure)), status=form.status(failure))
    if failure.retry_after is not None:
        response.headers["Retry-After"] = str(failure.retry_after)
    if failure.allow is not None:
        response.headers["Allow"] = failure.allow
    if failure.accept_encoding is not None:
        response.headers["Accept-Encoding"] = failure.accept_encoding
    return response
