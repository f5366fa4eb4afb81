"""The HTTP server: routes, the key check, request ids and errors."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.http import HttpProcessingError

from frontend.api_keys import ApiKeys
from frontend.config import FrontendConfig
from frontend.generation import GenerationPipeline
from frontend.generation_request import check_request_id
from frontend.http.errors import error_response, http_error_response
from frontend.http.generate import GenerateHandlers
from frontend.http.operations import OperationHandlers
from frontend.http.request_id import REQUEST_ID
from frontend.metrics import FrontendMetrics
from pagewire.errors import ConfigError, InvalidRequest, PagewireError

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_WITHOUT_KEY = frozenset(("/", "/health", "/ready", "/version"))
"""Paths that say nothing worth a key and that probes must reach."""

_FLUSH_TIMEOUT = 2.0
"""Seconds that connections get to take what was written, once everything has ended."""


class _NoMalformedRequests(logging.Filter):
    """Keeps requests that are not HTTP, which anyone can send, from filling the log with tracebacks."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


logging.getLogger("aiohttp.server").addFilter(_NoMalformedRequests())


class HttpServer:
    """The listening server.

    Attributes:
        port: the port it listens on, once started.
    """

    def __init__(
        self, config: FrontendConfig, pipeline: GenerationPipeline, metrics: FrontendMetrics
    ) -> None:
        self._config = config
        self._pipeline = pipeline
        self._api_keys = ApiKeys(config.api_keys)
        self.port = config.port
        app = web.Application(
            middlewares=[self._answer_errors, self._admit], client_max_size=config.max_body_bytes
        )
        app.on_response_prepare.append(self._add_headers)
        _add_routes(app, GenerateHandlers(pipeline), OperationHandlers(pipeline, metrics))
        # A handler whose client disconnects is cancelled, which is what aborts its generation.
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=_FLUSH_TIMEOUT
        )

    async def start(self) -> None:
        """Starts listening.

        Raises:
            ConfigError: the address cannot be had.
        """
        await self._runner.setup()
        site = web.TCPSite(
            self._runner, self._config.host, self._config.port, reuse_port=self._config.reuse_port
        )
        try:
            await site.start()
        except OSError as error:
            address = f"{self._config.host}:{self._config.port}"
            raise ConfigError(f"cannot listen on {address} for HTTP: {error}") from error
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Closes the port and the connections."""
        await self._runner.cleanup()

    @web.middleware
    async def _answer_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Gives the request its id and turns what is raised into a response."""
        began = time.perf_counter()
        request[REQUEST_ID] = check_request_id(None)
        response: web.StreamResponse
        try:
            request[REQUEST_ID] = check_request_id(request.headers.get("x-request-id"))
            response = await handler(request)
        except PagewireError as error:
            response = error_response(error)
        except web.HTTPException as error:
            response = http_error_response(error)
        except web.RequestPayloadError as error:
            response = error_response(InvalidRequest(f"the request's body cannot be read: {error}"))
        except Exception:
            logger.exception("request %s failed unexpectedly", request[REQUEST_ID])
            response = error_response(PagewireError("internal error; the server's log has the details"))
        logger.debug(
            "request %s: %s %s -> %d in %.1f ms",
            request[REQUEST_ID],
            request.method,
            request.path,
            response.status,
            (time.perf_counter() - began) * 1e3,
        )
        return response

    @web.middleware
    async def _admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Checks what every request must have: a key, and a body of a size that is taken."""
        if request.path not in _WITHOUT_KEY:
            self._api_keys.check(request.headers.get("authorization"), request.headers.get("x-api-key"))
        limit = self._config.max_body_bytes
        if (request.content_length or 0) > limit:
            # Refused by its header alone, before any of it is read.
            raise web.HTTPRequestEntityTooLarge(
                max_size=limit,
                actual_size=request.content_length or 0,
                text=f"the request body has {request.content_length} bytes; at most {limit} are taken",
            )
        return await handler(request)

    async def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers["x-request-id"] = request.get(REQUEST_ID) or check_request_id(None)
        if self._pipeline.draining:
            response.force_close()


def _add_routes(app: web.Application, generate: GenerateHandlers, operations: OperationHandlers) -> None:
    app.add_routes(
        [
            web.post("/v1/chat/completions", generate.chat_completions),
            web.post("/v1/completions", generate.completions),
            web.get("/v1/models", operations.models),
            web.get("/v1/models/{id:.+}", operations.model),
            web.post("/tokenize", operations.tokenize),
            web.post("/detokenize", operations.detokenize),
            web.get("/health", operations.health),
            web.get("/ready", operations.ready),
            web.get("/version", operations.version),
            web.get("/metrics", operations.metrics),
            web.get("/", operations.index),
        ]
    )
