"""The HTTP server: routes, the key check, request ids and errors."""

from __future__ import annotations

import asyncio
import logging
import time

from aiohttp import web

from frontend.access_log import AccessLog
from frontend.api_keys import ApiKeys, admin_keys
from frontend.caller import set_caller
from frontend.config import FrontendConfig
from frontend.generation.pipeline import GenerationPipeline
from frontend.generation.request import check_request_id
from frontend.http.apis import APIS, ENDPOINTS
from frontend.http.body import ALLOW_UNKNOWN_FIELDS
from frontend.http.connection import REQUEST_ID_HEADER, ApiRunner
from frontend.http.console.endpoints import ASSETS
from frontend.http.content import ContentRefused, check_content_type, read_content, too_large
from frontend.http.cors import CorsPolicy
from frontend.http.endpoint import Handler
from frontend.http.errors import error_response
from frontend.http.event_stream import PING_INTERVAL
from frontend.http.failure import Failure
from frontend.http.relaxed import add_relaxed_header
from frontend.http.request_id import REQUEST_ID
from frontend.metrics import FrontendMetrics
from frontend.tracing import FrontendTracing
from pagewire.base.errors import ConfigError, InvalidRequest, PagewireError
from pagewire.base.tls import ReloadingTls
from pagewire.telemetry.context import TRACEPARENT, TRACESTATE, RequestContext
from pagewire.telemetry.spans import Attributes

logger = logging.getLogger(__name__)

_WITHOUT_KEY = frozenset(endpoint.path for endpoint in ENDPOINTS if not endpoint.needs_key)
"""Paths that say nothing worth a key and that probes, or people who read about the server, must reach."""

_ADMIN = frozenset(endpoint.path for endpoint in ENDPOINTS if endpoint.needs_admin)
"""Paths that change what is served."""

_PROBES = frozenset(
    ("/health", "/ping", "/ready", "/metrics", "/load", "/v2/health/live", "/v2/health/ready")
)
"""Paths that monitoring asks for every few seconds: not worth a line each in the log."""

_ANTHROPIC_ID_HEADER = "request-id"
"""Where Anthropic's clients look for a request's id."""

_BACKLOG = 4096
"""Connections that wait to be accepted; a client beyond them tries again after a second, or is reset. (Linux
takes no more than net.core.somaxconn.)"""

_FLUSH_TIMEOUT = 2.0
"""Seconds that connections get to take what was written, once everything has ended."""


class HttpServer:
    """The listening server.

    Attributes:
        port: the port it listens on, once started.
    """

    def __init__(
        self,
        config: FrontendConfig,
        pipeline: GenerationPipeline,
        metrics: FrontendMetrics,
        access_log: AccessLog,
        tracing: FrontendTracing,
        tls: ReloadingTls | None = None,
    ) -> None:
        self._tls = tls
        self._config = config
        self._pipeline = pipeline
        self._access_log = access_log
        self._tracing = tracing
        self._api_keys = ApiKeys.load(config.api_keys, config.api_key_file)
        self._admin_keys = admin_keys(config.admin_api_keys, self._api_keys)
        self._cors = CorsPolicy(config)
        self.port = config.port
        app = web.Application(
            middlewares=[self._answer_errors, self._admit], client_max_size=config.max_body_bytes
        )
        app[PING_INTERVAL] = config.sse_ping_interval
        app.on_response_prepare.append(self._add_headers)
        _add_routes(app, config, pipeline, metrics)
        # A handler whose client disconnects is cancelled, which is what aborts its generation.
        self._runner = ApiRunner(
            app,
            head_timeout=config.request_timeout,
            max_connections=config.max_connections,
            keepalive_timeout=config.idle_timeout,
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=_FLUSH_TIMEOUT,
            auto_decompress=False,  # read_content does it, within limits
        )

    async def start(self) -> None:
        """Starts listening.

        Raises:
            ConfigError: the address cannot be had.
        """
        await self._runner.setup()
        self._site = web.TCPSite(
            self._runner,
            self._config.host,
            self._config.port,
            ssl_context=None if self._tls is None else self._tls.context,
            reuse_port=self._config.reuse_port,
            backlog=_BACKLOG,
        )
        try:
            await self._site.start()
        except OSError as error:
            address = f"{self._config.host}:{self._config.port}"
            raise ConfigError(f"cannot listen on {address} for HTTP: {error}") from error
        self.port = self._runner.addresses[0][1]

    async def stop_listening(self) -> None:
        """Closes the port, and no connection."""
        await self._site.stop()

    def close_idle(self) -> int:
        """Closes every connection that no request is being answered on, the others when that is over.

        Returns:
            How many are left.
        """
        server = self._runner.server
        assert server is not None
        server.pre_shutdown()
        return len(server.connections)

    async def stop(self) -> None:
        """Closes the port and the connections."""
        await self._runner.cleanup()

    @web.middleware
    async def _answer_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Gives the request its id, turns what is raised into a response, and notes the end."""
        began = time.perf_counter()
        request[REQUEST_ID] = check_request_id(None)
        is_probe = request.path in _PROBES
        headers = request.headers
        context = self._tracing.begin(
            request[REQUEST_ID],
            headers.get(TRACEPARENT),
            headers.get(TRACESTATE),
            traced=request.method == "POST",
        )
        outcome = "client closed"  # what it is if this is cancelled
        try:
            response = await self._answer(request, handler, context)
            outcome = str(response.status)
            return response
        finally:
            self._access_log.ended(
                request[REQUEST_ID],
                request.remote or "-",
                f"{request.method} {request.path}",
                outcome,
                began,
                probe=is_probe,
            )
            context.request_id = request[REQUEST_ID]
            self._end_span(request, context, outcome)

    def _end_span(self, request: web.Request, context: RequestContext, outcome: str) -> None:
        if context.trace is None:
            return
        resource = request.match_info.route.resource
        route = request.path if resource is None else resource.canonical
        attributes: Attributes = {
            "http.request.method": request.method,
            "http.route": route,
            "url.path": request.path,
        }
        if outcome.isdecimal():
            attributes["http.response.status_code"] = int(outcome)
        error = "" if outcome.isdecimal() and int(outcome) < 500 else outcome
        self._tracing.ended(context, f"{request.method} {route}", attributes, error)

    async def _answer(
        self, request: web.Request, handler: Handler, context: RequestContext
    ) -> web.StreamResponse:
        try:
            request[REQUEST_ID] = check_request_id(request.headers.get(REQUEST_ID_HEADER))
            context.request_id = request[REQUEST_ID]
            return await handler(request)
        except PagewireError as error:
            return error_response(request.path, error, request[REQUEST_ID])
        except web.HTTPException as error:
            return error_response(request.path, Failure.of_http(error), request[REQUEST_ID])
        except ContentRefused as refused:
            return error_response(request.path, refused.failure, request[REQUEST_ID])
        except web.RequestPayloadError as error:
            unreadable = InvalidRequest(f"the request's body cannot be read: {error}")
            return error_response(request.path, unreadable, request[REQUEST_ID])
        except Exception:
            logger.exception("request %s failed unexpectedly", request[REQUEST_ID])
            unexpected = PagewireError("internal error; the server's log has the details")
            return error_response(request.path, unexpected, request[REQUEST_ID])

    @web.middleware
    async def _admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Checks what every request must have: a key, and a body of a type and size that are taken, sent in
        time."""
        preflight = self._cors.preflight(request)
        if preflight is not None:
            return preflight  # browsers send it without a key
        if request.path not in _WITHOUT_KEY and not request.path.startswith(ASSETS):
            headers = request.headers
            keys = self._admin_keys if request.path in _ADMIN else self._api_keys
            set_caller(keys.check(headers.get("authorization"), headers.get("x-api-key")))
        if self._config.allow_unknown_fields:
            ALLOW_UNKNOWN_FIELDS.set(True)
        limit = self._config.max_body_bytes
        size = request.content_length or 0
        if size > limit:
            # Refused by its header alone, before any of it is read.
            message = f"the request body has {size} bytes; at most {limit} are taken"
            raise too_large(message, limit, size)
        if request.body_exists:
            if request.method == "POST" and request.match_info.http_exception is None:
                # There is such a path. With other methods browsers send no body before they have asked.
                check_content_type(request, self._cors)
            try:
                async with asyncio.timeout(self._config.request_timeout):
                    await read_content(request, limit)
            except TimeoutError:
                return _too_slow(request, self._config.request_timeout)
        return await handler(request)

    async def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        request_id = request.get(REQUEST_ID) or check_request_id(None)
        response.headers[REQUEST_ID_HEADER] = request_id
        response.headers[_ANTHROPIC_ID_HEADER] = request_id
        add_relaxed_header(request, response)
        self._cors.add_headers(request, response)
        if self._pipeline.leaving or self._pipeline.draining:
            response.headers["Connection"] = "close"  # aiohttp has decided on this header already
            response.force_close()


def _too_slow(request: web.Request, seconds: float) -> web.Response:
    message = f"the request's body did not arrive within {seconds:g} s"
    failure = Failure(status=408, message=message, kind="timeout_error", code="request_timeout")
    response = error_response(request.path, failure, request[REQUEST_ID])
    response.force_close()
    return response


def _add_routes(
    app: web.Application, config: FrontendConfig, pipeline: GenerationPipeline, metrics: FrontendMetrics
) -> None:
    for api in APIS:
        handlers = api.handlers(config, pipeline, metrics)
        for endpoint in api.endpoints:
            handler = handlers[endpoint.name]
            if endpoint.method == "GET":
                app.router.add_get(endpoint.route, handler)  # and HEAD
            else:
                app.router.add_route(endpoint.method, endpoint.route, handler)
