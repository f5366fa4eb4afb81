"""The console's files, as `make console` built them: what they are served with."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files

from aiohttp import web

from pagewire.base.errors import NotFound

_STATIC = files("frontend.http.console").joinpath("static")

_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "woff2": "font/woff2",
}
_COMPRESSED = ("css", "html", "js", "svg")

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Content-Security-Policy: nothing but this server's own files and API. What a model answers can neither run
nor send anything anywhere, and no other site can frame the console.
"""

_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept-Encoding",
    "X-Content-Type-Options": "nosniff",
}

_FOREVER = "public, max-age=31536000, immutable"
"""Of files whose names change with their contents."""

_ASK_FIRST = "no-cache"


@dataclass
class _File:
    """A file in memory.

    Attributes:
        kind: its name's ending.
        caching: its Cache-Control header.
    """

    content: bytes
    kind: str
    caching: str

    @cached_property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'

    @cached_property
    def compressed(self) -> bytes:
        return gzip.compress(self.content, mtime=0)

    def answer(self, request: web.Request) -> web.Response:
        """The file, or 304 for a browser that has it."""
        headers = {**_HEADERS, "Cache-Control": self.caching, "ETag": self.etag}
        if self.etag in request.headers.get("if-none-match", ""):
            return web.Response(status=304, headers=headers)
        headers["Content-Type"] = _TYPES[self.kind]
        if self.kind in _COMPRESSED and "gzip" in request.headers.get("accept-encoding", ""):
            return web.Response(body=self.compressed, headers={**headers, "Content-Encoding": "gzip"})
        return web.Response(body=self.content, headers=headers)


class ConsolePages:
    """Answers with the console's files. They are read once."""

    def __init__(self) -> None:
        self._pages = {
            name: _File(_STATIC.joinpath(f"{name}.html").read_bytes(), "html", _ASK_FIRST)
            for name in ("index", "engine")
        }
        self._assets = {
            entry.name: _File(entry.read_bytes(), entry.name.rpartition(".")[2], _FOREVER)
            for entry in _STATIC.joinpath("assets").iterdir()
        }

    async def chat(self, request: web.Request) -> web.Response:
        """GET /"""
        return self._pages["index"].answer(request)

    async def engine(self, request: web.Request) -> web.Response:
        """GET /engine"""
        return self._pages["engine"].answer(request)

    async def asset(self, request: web.Request) -> web.Response:
        """GET /assets/{file}

        Raises:
            NotFound: there is no such file.
        """
        name = request.match_info["file"]
        if name not in self._assets:
            raise NotFound(f"the console has no file {name!r}; load its page again")
        return self._assets[name].answer(request)
