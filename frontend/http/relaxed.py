"""The header that says what of a request's schemas is not enforced."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from frontend.generation.constraints import in_a_line

RELAXED_HEADER = "X-Pagewire-Relaxed-Schemas"
"""Tools, as tools.NAME, and keywords, as response_format.KEYWORD, separated by commas."""

# Before aiohttp 3.14 keys are strings.
_RELAXED: web.RequestKey[str] = (
    web.RequestKey("relaxed", str) if hasattr(web, "RequestKey") else "relaxed"  # type: ignore[assignment]
)


def note_relaxed(http_request: web.Request, relaxed: Sequence[str]) -> None:
    """Notes what is not enforced, before anything is answered."""
    if relaxed:
        http_request[_RELAXED] = in_a_line(relaxed)


def add_relaxed_header(http_request: web.Request, response: web.StreamResponse) -> None:
    """Puts into an answer's headers what was noted of its request."""
    if _RELAXED in http_request:
        response.headers[RELAXED_HEADER] = http_request[_RELAXED]
