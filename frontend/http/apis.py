"""The APIs that this server has. Routes and /openapi.json come from here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from frontend.config import FrontendConfig
from frontend.generation.pipeline import GenerationPipeline
from frontend.http.anthropic.endpoints import ANTHROPIC
from frontend.http.console.endpoints import CONSOLE
from frontend.http.endpoint import Api, Endpoint, Handler
from frontend.http.ollama.endpoints import OLLAMA
from frontend.http.openai.endpoints import OPENAI
from frontend.http.openapi import openapi_document
from frontend.http.operations.endpoints import OPERATIONS
from frontend.http.scoring.endpoints import SCORING
from frontend.http.triton.endpoints import TRITON
from frontend.metrics import FrontendMetrics

_OPENAPI = Endpoint(
    name="openapi",
    method="GET",
    path="/openapi.json",
    tag="Documentation",
    summary="This document",
    answer=dict[str, Any],
    errors=(400,),
    needs_key=False,
)


def _openapi_handlers(
    config: FrontendConfig, pipeline: GenerationPipeline, metrics: FrontendMetrics
) -> Mapping[str, Handler]:
    with_keys = bool(config.api_keys or config.api_key_file)
    document: bytes | None = None

    async def openapi(request: web.Request) -> web.Response:
        """GET /openapi.json: made when somebody first asks."""
        nonlocal document
        if document is None:
            document = json.dumps(openapi_document(ENDPOINTS, with_keys=with_keys)).encode()
        return web.Response(body=document, content_type="application/json")

    return {"openapi": openapi}


APIS = (OPENAI, ANTHROPIC, OLLAMA, TRITON, SCORING, OPERATIONS, CONSOLE, Api((_OPENAPI,), _openapi_handlers))

ENDPOINTS = tuple(endpoint for api in APIS for endpoint in api.endpoints)
