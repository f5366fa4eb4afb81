"""Errors in Ollama's form: {"error": "what was wrong"}."""

from __future__ import annotations

from collections.abc import Mapping

from frontend.http.failure import ErrorForm, Failure

_STATUSES: Mapping[int, int] = {429: 503}
"""By the statuses of OpenAI's API, where Ollama has another: its clients come again after a 503."""


class OllamaErrors(ErrorForm):
    """Ollama's form."""

    def status(self, failure: Failure) -> int:
        return _STATUSES.get(failure.status, failure.status)

    def body(self, failure: Failure) -> dict[str, str]:
        return {"error": failure.message}


OLLAMA_ERRORS = OllamaErrors()
