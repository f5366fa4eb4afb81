"""Everything but generation: models, tokens, health, metrics and the front page."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from aiohttp import web

from frontend.generation import GenerationPipeline
from frontend.http.schemas.base import parse
from frontend.http.schemas.text import DetokenizeBody, TokenizeBody
from frontend.metrics import FrontendMetrics
from pagewire import __version__
from pagewire.errors import Unavailable

_INDEX = files("frontend.http").joinpath("static/index.html")


class OperationHandlers:
    """Endpoints that answer from what is known, or with one call to the scheduler."""

    def __init__(self, pipeline: GenerationPipeline, metrics: FrontendMetrics) -> None:
        self._pipeline = pipeline
        self._metrics = metrics
        self._index = _INDEX.read_text(encoding="utf-8")

    async def index(self, request: web.Request) -> web.Response:
        """GET /"""
        return web.Response(text=self._index, content_type="text/html")

    async def health(self, request: web.Request) -> web.Response:
        """GET /health: the process lives."""
        return web.json_response({"status": "ok"})

    async def ready(self, request: web.Request) -> web.Response:
        """GET /ready: a request sent now would be served."""
        if self._pipeline.ready:
            return web.json_response({"status": "ready"})
        if self._pipeline.draining:
            raise Unavailable("this server is shutting down")
        raise Unavailable(self._pipeline.link.why_not_ready())

    async def version(self, request: web.Request) -> web.Response:
        """GET /version"""
        return web.json_response({"version": __version__})

    async def metrics(self, request: web.Request) -> web.Response:
        """GET /metrics: the scheduler's metrics, as long as it can be reached, and this frontend's own."""
        try:
            exposition = await self._pipeline.link.get_metrics()
        except Unavailable:
            exposition = b""  # pagewire:frontend_scheduler_ready tells
        if exposition and not exposition.endswith(b"\n"):
            exposition += b"\n"
        return web.Response(
            body=exposition + self._metrics.exposition(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def models(self, request: web.Request) -> web.Response:
        """GET /v1/models"""
        data = [self._model(name) for name in self._pipeline.model.names]
        return web.json_response({"object": "list", "data": data})

    async def model(self, request: web.Request) -> web.Response:
        """GET /v1/models/{id}"""
        name = request.match_info["id"]
        self._pipeline.model.check_name(name)
        return web.json_response(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        facts = self._pipeline.link.model
        return {
            "id": name,
            "object": "model",
            "created": self._pipeline.model.created,
            "owned_by": "pagewire",
            "max_model_len": None if facts is None else facts.max_model_len,
        }

    async def tokenize(self, request: web.Request) -> web.Response:
        """POST /tokenize"""
        body = parse(TokenizeBody, await request.read())
        self._pipeline.model.check_name(body.model or "")
        tokens = await self._pipeline.tokenize(body.to_tokenize())
        facts = self._pipeline.link.model
        return web.json_response(
            {
                "tokens": tokens,
                "count": len(tokens),
                "max_model_len": None if facts is None else facts.max_model_len,
            }
        )

    async def detokenize(self, request: web.Request) -> web.Response:
        """POST /detokenize"""
        body = parse(DetokenizeBody, await request.read())
        self._pipeline.model.check_name(body.model or "")
        text = await self._pipeline.detokenize(body.tokens, skip_special_tokens=body.skip_special_tokens)
        return web.json_response({"prompt": text}, dumps=lambda value: json.dumps(value, ensure_ascii=False))
