"""Errors in Anthropic's form: {"type": "error", "error": {"type", "message"}, "request_id"}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frontend.http.failure import ErrorForm, Failure

OVERLOADED = 529
"""Anthropic's status for a server that cannot serve anybody now, instead of 503."""

_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    OVERLOADED: "overloaded_error",
}
"""By status; of the others, those below 500 are invalid_request_error and the rest api_error."""


class AnthropicErrors(ErrorForm):
    """The form of everything under /v1/messages. It names no field and no code: the message does."""

    def status(self, failure: Failure) -> int:
        return OVERLOADED if failure.status == 503 else failure.status

    def body(self, failure: Failure) -> dict[str, Any]:
        status = self.status(failure)
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
        return {
            "type": "error",
            "error": {"type": kind, "message": failure.message},
            "request_id": failure.request_id,
        }


ANTHROPIC_ERRORS = AnthropicErrors()
