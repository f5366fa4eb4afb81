"""The endpoints of models with a classification head. No such model is served yet, and they say so."""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web

from frontend.config import FrontendConfig
from frontend.generation.pipeline import GenerationPipeline
from frontend.generation.request import check_request_id
from frontend.http.body import parse
from frontend.http.endpoint import ERRORS_OF_BODIES, Api, Endpoint, Handler
from frontend.http.request_id import REQUEST_ID
from frontend.http.scoring.bodies import ClassifyBody, RerankBody, ScoreBody, ScoringBody
from frontend.metrics import FrontendMetrics
from pagewire.base.errors import Unsupported

_QUERY = "What is the capital of France?"
_DOCUMENTS = ["Paris is the capital of France.", "Berlin is in Germany."]

_KINDS = (
    ("rerank", "Rank documents by a query", RerankBody, {"query": _QUERY, "documents": _DOCUMENTS}),
    ("score", "Score pairs of texts", ScoreBody, {"text_1": _QUERY, "text_2": _DOCUMENTS}),
    ("classify", "Classify texts", ClassifyBody, {"input": _DOCUMENTS}),
)

_ENDPOINTS = tuple(
    Endpoint(
        name=name + suffix,
        method="POST",
        path=f"{prefix}/{name}",
        tag="Scoring",
        summary=summary,
        description="Needs a model with a classification head; of the others, and so of all that are served, "
        "it answers 400.",
        body=body,
        example=example,
        errors=ERRORS_OF_BODIES,
    )
    for name, summary, body, example in _KINDS
    for prefix, suffix in (("/v1", ""), ("", "Unprefixed"))
)


class ScoringHandlers:
    """Reads the requests and refuses them."""

    def __init__(self, pipeline: GenerationPipeline) -> None:
        self._pipeline = pipeline

    async def rerank(self, request: web.Request) -> web.Response:
        """POST /v1/rerank and /rerank."""
        body = parse(RerankBody, await request.read())
        body.pairs()
        raise self._no_head(request, body, "rerank documents", "a cross-encoder (a reranker)")

    async def score(self, request: web.Request) -> web.Response:
        """POST /v1/score and /score."""
        body = parse(ScoreBody, await request.read())
        body.pairs()
        raise self._no_head(request, body, "score pairs of texts", "a cross-encoder (a reranker)")

    async def classify(self, request: web.Request) -> web.Response:
        """POST /v1/classify and /classify."""
        body = parse(ClassifyBody, await request.read())
        raise self._no_head(request, body, "classify texts", "a classifier")

    def _no_head(self, request: web.Request, body: ScoringBody, wanted: str, needed: str) -> Unsupported:
        """The refusal of a request that is right in itself.

        Raises:
            NotFound: it names another model.
            InvalidRequest: its request_id is no id.
        """
        if body.request_id:
            request[REQUEST_ID] = check_request_id(body.request_id)
        model = self._pipeline.model
        model.check_name(body.model or "")
        return Unsupported(
            f"the model {model.names[0]!r} has no classification head, so it cannot {wanted}: that takes "
            f"{needed}, a checkpoint whose architecture is named ...ForSequenceClassification, which this "
            "server does not serve yet. Texts can be compared by the cosine of their embeddings "
            "(/v1/embeddings)",
            param="model",
        )


def _handlers(
    config: FrontendConfig, pipeline: GenerationPipeline, metrics: FrontendMetrics
) -> Mapping[str, Handler]:
    handlers = ScoringHandlers(pipeline)
    by_name = {"rerank": handlers.rerank, "score": handlers.score, "classify": handlers.classify}
    return {name + suffix: handler for name, handler in by_name.items() for suffix in ("", "Unprefixed")}


SCORING = Api(_ENDPOINTS, _handlers)
