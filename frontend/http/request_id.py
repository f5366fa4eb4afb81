"""Where a request's id is kept while HTTP handles it."""

from __future__ import annotations

from aiohttp import web

REQUEST_ID: web.RequestKey[str]
"""The caller's id (from the body, else the x-request-id header) or a drawn one."""

if hasattr(web, "RequestKey"):
    REQUEST_ID = web.RequestKey("request_id", str)
else:  # aiohttp before 3.14, where keys are strings
    REQUEST_ID = "request_id"  # type: ignore[assignment]
