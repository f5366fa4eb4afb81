"""JSON as Ollama's endpoints write it: in one line, with text as it is."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web


def json_text(value: Any) -> str:
    """A value as JSON without white space."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def json_line(value: Any) -> bytes:
    """A line of a stream."""
    return json_text(value).encode() + b"\n"


def json_response(value: Any) -> web.Response:
    """A whole answer."""
    return web.json_response(value, dumps=json_text)
