"""/api/embed and /api/embeddings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from aiohttp import web

from frontend.embedding import EmbeddingRequest, Embeddings, embed
from frontend.generation.pipeline import GenerationPipeline
from frontend.http.body import parse
from frontend.http.ollama.names import served_name
from frontend.http.ollama.replies import json_response, json_text
from frontend.http.ollama.schemas.embeddings import OllamaEmbedBody, OllamaEmbeddingsBody
from frontend.http.request_id import REQUEST_ID
from frontend.pooled import Vector


class OllamaEmbeddingHandlers:
    """The endpoints that turn inputs into vectors."""

    def __init__(self, pipeline: GenerationPipeline) -> None:
        self._pipeline = pipeline

    async def embed(self, http_request: web.Request) -> web.Response:
        """POST /api/embed."""
        began = time.perf_counter_ns()
        body = parse(OllamaEmbedBody, await http_request.read())
        model = served_name(self._pipeline.model, body.model)
        vectors: list[Vector] = []
        num_tokens = 0
        if body.inputs():
            embeddings = await self._embed(body.to_embed(http_request[REQUEST_ID], model))
            vectors, num_tokens = embeddings.vectors, embeddings.usage.prompt_tokens
        rest = {
            "total_duration": time.perf_counter_ns() - began,
            "load_duration": 1,  # the model is there
            "prompt_eval_count": num_tokens,
        }
        name = json_text(body.model or model).encode()
        return web.Response(
            body=b'{"model":%b,"embeddings":[%b],%b'
            % (name, await _rows(vectors), json_text(rest)[1:].encode()),
            content_type="application/json",
            charset="utf-8",
        )

    async def embeddings(self, http_request: web.Request) -> web.Response:
        """POST /api/embeddings."""
        body = parse(OllamaEmbeddingsBody, await http_request.read())
        model = served_name(self._pipeline.model, body.model)
        if not body.prompt:
            return json_response({"embedding": []})
        embeddings = await self._embed(body.to_embed(http_request[REQUEST_ID], model))
        return json_response({"embedding": embeddings.vectors[0].tolist()})

    async def _embed(self, request: EmbeddingRequest) -> Embeddings:
        """More dimensions than a vector has are all that it has."""
        facts = self._pipeline.link.model
        if facts is not None and request.dimensions is not None and request.dimensions >= facts.hidden_size:
            request = replace(request, dimensions=None)
        return await embed(self._pipeline, request)


async def _rows(vectors: Sequence[Vector]) -> bytes:
    """The vectors as JSON, with a pause after each: all of them may take seconds to write."""
    written = []
    for vector in vectors:
        written.append(json_text(vector.tolist()).encode())
        await asyncio.sleep(0)
    return b",".join(written)
