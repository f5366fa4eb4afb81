"""Cross-origin resource sharing: which web pages may call this server from a browser (Fetch standard)."""

from __future__ import annotations

from aiohttp import web
from multidict import CIMultiDict

from frontend.config import FrontendConfig
from frontend.http.errors import error_response
from frontend.http.failure import Failure

_METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")
_EXPOSED = "x-request-id, retry-after, x-pagewire-relaxed-schemas"
_MAX_AGE = 600
"""Seconds for which a browser may remember a preflight's answer."""


class CorsPolicy:
    """Adds to answers what tells a browser that the page may read them."""

    def __init__(self, config: FrontendConfig) -> None:
        self._origins = frozenset(config.allowed_origins) - {"none"}
        self._any_origin = "*" in self._origins
        methods = config.allowed_methods
        self._methods = frozenset(_METHODS if "*" in methods else (name.upper() for name in methods))
        self._any_header = "*" in config.allowed_headers
        self._headers = frozenset(name.lower() for name in config.allowed_headers)
        self._credentials = config.allow_credentials

    def add_headers(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        """Lets the page that asked read the answer, if its origin is allowed."""
        origin = request.headers.get("origin")
        if not self._origins or origin is None:
            return
        if not self._any_origin:
            response.headers.add("Vary", "Origin")
        if not self.allows(origin):
            return
        response.headers["Access-Control-Allow-Origin"] = "*" if self._any_origin else origin
        response.headers["Access-Control-Expose-Headers"] = _EXPOSED
        if self._credentials:
            response.headers["Access-Control-Allow-Credentials"] = "true"

    def preflight(self, request: web.Request) -> web.Response | None:
        """The answer to a browser that asks whether it may send a request; None if it asks nothing."""
        method = request.headers.get("access-control-request-method")
        origin = request.headers.get("origin")
        if request.method != "OPTIONS" or method is None or origin is None:
            return None
        names = request.headers.get("access-control-request-headers", "")
        wanted = [name.strip() for name in names.split(",") if name.strip()]
        refused = [name for name in wanted if not (self._any_header or name.lower() in self._headers)]
        if not self.allows(origin):
            return _refusal(request, "this origin may not call this server")
        if method.upper() not in self._methods:
            return _refusal(request, f"pages may use the methods {', '.join(sorted(self._methods))}")
        if refused:
            return _refusal(request, f"pages may not send the header {refused[0]}")
        headers = CIMultiDict(
            {
                "Access-Control-Allow-Methods": ", ".join(sorted(self._methods)),
                "Access-Control-Max-Age": str(_MAX_AGE),
            }
        )
        if wanted:
            # Named one by one, because * would not cover Authorization.
            headers["Access-Control-Allow-Headers"] = ", ".join(wanted)
        return web.Response(status=204, headers=headers)

    def allows(self, origin: str) -> bool:
        """Whether pages of this origin may call."""
        return self._any_origin or origin in self._origins


def _refusal(request: web.Request, message: str) -> web.Response:
    return error_response(request.path, Failure(status=403, message=message, code="cors"))
