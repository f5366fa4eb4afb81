"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from frontend.http.failure import ErrorForm, Failure


class OpenAiErrors(ErrorForm):
    """OpenAI's form; also that of paths which belong to no API."""

    def status(self, failure: Failure) -> int:
        return failure.status

    def body(self, failure: Failure) -> dict[str, Any]:
        return {
            "error": {
                "message": failure.message,
                "type": failure.kind,
                "param": failure.param,
                "code": failure.code,
            }
        }


OPENAI_ERRORS = OpenAiErrors()
