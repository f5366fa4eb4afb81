"""JSON with text as it is, instead of escaped."""

from __future__ import annotations

import json

from aiohttp import web


def json_text(value: object) -> str:
    """A value as JSON."""
    return json.dumps(value, ensure_ascii=False)


def json_response(value: object, *, status: int = 200) -> web.Response:
    """A whole answer."""
    return web.json_response(value, status=status, dumps=json_text)
