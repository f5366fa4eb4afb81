"""Errors in Triton's form: {"error": "text"}. Its own client fails on any other."""

from __future__ import annotations

from frontend.http.failure import ErrorForm, Failure

_STATUSES = {
    # By what happened (Failure.code), where Triton's status is another than OpenAI's.
    "server_overloaded": 503,
    "deadline_exceeded": 503,
    "unsupported_parameter": 501,
}


class TritonErrors(ErrorForm):
    """Triton's form."""

    def status(self, failure: Failure) -> int:
        return _STATUSES.get(failure.code or "", failure.status)

    def body(self, failure: Failure) -> dict[str, str]:
        return {"error": failure.message}


TRITON_ERRORS = TritonErrors()
