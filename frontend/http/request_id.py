"""Where a request's id is kept while HTTP handles it."""

from __future__ import annotations

from aiohttp import web

# Before aiohttp 3.14 keys are strings.
REQUEST_ID: web.RequestKey[str] = (
    web.RequestKey("request_id", str) if hasattr(web, "RequestKey") else "request_id"  # type: ignore[assignment]
)
"""The caller's id (from the body, else the x-request-id header) or a drawn one."""
