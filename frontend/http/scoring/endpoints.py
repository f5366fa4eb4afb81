"""The endpoints of models that classify texts and score pairs of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from frontend.config import FrontendConfig
from frontend.generation.events import Usage
from frontend.generation.pipeline import GenerationPipeline
from frontend.generation.request import check_request_id
from frontend.http.body import parse
from frontend.http.endpoint import ERRORS_OF_BODIES, Api, Endpoint, Handler
from frontend.http.json_text import json_response
from frontend.http.request_id import REQUEST_ID
from frontend.http.scoring.answers import ClassificationList, Ranking, ScoreList
from frontend.http.scoring.bodies import ClassifyBody, RerankBody, ScoreBody, ScoringBody
from frontend.metrics import FrontendMetrics
from frontend.scoring.classification import classify
from frontend.scoring.score import score

_QUERY = "What is the capital of France?"
_DOCUMENTS = ["Paris is the capital of France.", "Berlin is in Germany."]
_SCORERS = (
    "Needs a cross-encoder, an embedding model or a generator that was made a scorer (docs/scoring.md)."
)

_KINDS = (
    ("rerank", "Rank documents by a query", RerankBody, {"query": _QUERY, "documents": _DOCUMENTS}, Ranking),
    ("score", "Score pairs of texts", ScoreBody, {"text_1": _QUERY, "text_2": _DOCUMENTS}, ScoreList),
    ("classify", "Classify texts", ClassifyBody, {"input": _DOCUMENTS}, ClassificationList),
)
_PREFIXES = {"/v1": "", "": "Unprefixed", "/v2": "V2"}

_ENDPOINTS = tuple(
    Endpoint(
        name=name + suffix,
        method="POST",
        path=f"{prefix}/{name}",
        tag="Scoring",
        summary=summary,
        description="Needs a model with a classification head." if name == "classify" else _SCORERS,
        body=body,
        example=example,
        answer=answer,
        errors=ERRORS_OF_BODIES,
    )
    for name, summary, body, example, answer in _KINDS
    for prefix, suffix in _PREFIXES.items()
    if name == "rerank" or prefix != "/v2"
)


class ScoringHandlers:
    """Reads the requests and puts together the answers."""

    def __init__(self, pipeline: GenerationPipeline) -> None:
        self._pipeline = pipeline

    async def rerank(self, request: web.Request) -> web.Response:
        """POST /v1/rerank and /rerank, after Jina: documents are returned unless it says otherwise."""
        return await self._rerank(request, return_documents=True)

    async def rerank_v2(self, request: web.Request) -> web.Response:
        """POST /v2/rerank, after Cohere: documents are returned if the request says so."""
        return await self._rerank(request, return_documents=False)

    async def _rerank(self, request: web.Request, *, return_documents: bool) -> web.Response:
        body = parse(RerankBody, await request.read())
        request_id = _request_id(request, body)
        scores = await score(self._pipeline, body.to_score(request_id))
        if body.return_documents is not None:
            return_documents = body.return_documents
        texts = body.texts()
        results: list[dict[str, Any]] = []
        for index in sorted(range(len(texts)), key=lambda index: -scores.values[index])[: body.top_n]:
            result: dict[str, Any] = {"index": index, "relevance_score": scores.values[index]}
            results.append(result | ({"document": {"text": texts[index]}} if return_documents else {}))
        return json_response(
            {
                "id": f"rerank-{request_id}",
                "model": self._model(body),
                "results": results,
                "usage": _usage(scores.usage),
            }
        )

    async def score(self, request: web.Request) -> web.Response:
        """POST /v1/score and /score."""
        body = parse(ScoreBody, await request.read())
        request_id = _request_id(request, body)
        scores = await score(self._pipeline, body.to_score(request_id))
        data = [
            {"index": index, "object": "score", "score": value} for index, value in enumerate(scores.values)
        ]
        return self._list(f"score-{request_id}", body, data, scores.usage)

    async def classify(self, request: web.Request) -> web.Response:
        """POST /v1/classify and /classify."""
        body = parse(ClassifyBody, await request.read())
        request_id = _request_id(request, body)
        found = await classify(self._pipeline, body.to_classify(request_id))
        data = [
            {"index": index, "label": found.best(row), "probs": row.tolist(), "num_classes": len(row)}
            for index, row in enumerate(found.rows)
        ]
        return self._list(f"classify-{request_id}", body, data, found.usage)

    def _list(self, name: str, body: ScoringBody, data: list[dict[str, Any]], usage: Usage) -> web.Response:
        return json_response(
            {
                "id": name,
                "object": "list",
                "created": int(time.time()),
                "model": self._model(body),
                "data": data,
                "usage": _usage(usage),
            }
        )

    def _model(self, body: ScoringBody) -> str:
        return body.model or self._pipeline.model.names[0]


def _request_id(request: web.Request, body: ScoringBody) -> str:
    """The id of a request: the body's, or that of its header, or a drawn one.

    Raises:
        InvalidRequest: the body's is no id.
    """
    if body.request_id:
        request[REQUEST_ID] = check_request_id(body.request_id)
    request_id: str = request[REQUEST_ID]
    return request_id


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.prompt_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _handlers(
    config: FrontendConfig, pipeline: GenerationPipeline, metrics: FrontendMetrics
) -> Mapping[str, Handler]:
    handlers = ScoringHandlers(pipeline)
    by_name = {"rerank": handlers.rerank, "score": handlers.score, "classify": handlers.classify}
    return {
        **{name + suffix: handler for name, handler in by_name.items() for suffix in ("", "Unprefixed")},
        "rerankV2": handlers.rerank_v2,
    }


SCORING = Api(_ENDPOINTS, _handlers)
