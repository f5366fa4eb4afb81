"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from typing import Any

from aiohttp import web

from frontend.embedding import Embeddings, embed
from frontend.generation.pipeline import GenerationPipeline
from frontend.generation.request import check_request_id
from frontend.http.body import parse
from frontend.http.openai.schemas.embeddings import EmbeddingBody
from frontend.http.request_id import REQUEST_ID
from frontend.pooled import Vector


class EmbeddingHandlers:
    """The endpoint that turns inputs into vectors."""

    def __init__(self, pipeline: GenerationPipeline) -> None:
        self._pipeline = pipeline

    async def embeddings(self, http_request: web.Request) -> web.Response:
        """POST /v1/embeddings."""
        body = parse(EmbeddingBody, await http_request.read())
        if body.request_id:
            http_request[REQUEST_ID] = check_request_id(body.request_id)
        request_id = http_request[REQUEST_ID]
        embeddings = await embed(self._pipeline, body.to_embed(request_id))
        rest = {
            "id": f"embd-{request_id}",
            "object": "list",
            "created": int(time.time()),
            "model": body.model or self._pipeline.model.names[0],
            "usage": _usage(embeddings),
        }
        data = await _data(embeddings.vectors, as_text=body.encoding_format == "base64")
        return web.Response(
            body=json.dumps(rest, ensure_ascii=False).encode()[:-1] + b', "data": [' + data + b"]}",
            content_type="application/json",
            charset="utf-8",
        )


def _usage(embeddings: Embeddings) -> dict[str, Any]:
    usage = embeddings.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.prompt_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


async def _data(vectors: list[Vector], *, as_text: bool) -> bytes:
    """The vectors as JSON, with a pause after each: all of them may take seconds to write."""
    written = []
    for index, vector in enumerate(vectors):
        value = base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_text else vector.tolist()
        written.append(json.dumps({"object": "embedding", "index": index, "embedding": value}).encode())
        await asyncio.sleep(0)
    return b", ".join(written)
