"""The Classify and Score RPCs: their messages and the pipeline's."""

from __future__ import annotations

from typing import Any

import grpc

from frontend.caller import client_of
from frontend.generation.events import Usage
from frontend.generation.pipeline import GenerationPipeline
from frontend.generation.request import check_request_id
from frontend.grpc.embedding import inputs_of, seconds_left
from frontend.scoring.classification import ClassificationRequest, classify
from frontend.scoring.score import ScoreRequest, pair_up, score
from pagewire.inference.v1 import inference_pb2


async def answer_classify(
    pipeline: GenerationPipeline,
    message: inference_pb2.ClassifyRequest,
    context: grpc.aio.ServicerContext,
) -> inference_pb2.ClassifyResponse:
    """Classifies what the message asks for.

    Raises:
        PagewireError: see `classify`.
    """
    request = ClassificationRequest(inputs=inputs_of(message), **_common(message, context))
    found = await classify(pipeline, request)
    return inference_pb2.ClassifyResponse(
        request_id=request.request_id,
        classifications=[
            inference_pb2.Classification(label=found.best(row), probs=row) for row in found.rows
        ],
        labels=found.labels,
        usage=_usage(found.usage),
    )


async def answer_score(
    pipeline: GenerationPipeline, message: inference_pb2.ScoreRequest, context: grpc.aio.ServicerContext
) -> inference_pb2.ScoreResponse:
    """Scores what the message asks for.

    Raises:
        PagewireError: see `score`.
    """
    pairs = pair_up(message.queries, message.documents, ("queries", "documents"))
    request = ScoreRequest(inputs=pairs, **_common(message, context))
    scores = await score(pipeline, request)
    return inference_pb2.ScoreResponse(
        request_id=request.request_id, scores=scores.values, usage=_usage(scores.usage)
    )


def _common(
    message: inference_pb2.ClassifyRequest | inference_pb2.ScoreRequest, context: grpc.aio.ServicerContext
) -> dict[str, Any]:
    """The fields of a request that both have."""
    has_limit = message.HasField("truncate_prompt_tokens")
    return {
        "request_id": check_request_id(message.request_id),
        "model": message.model,
        "use_activation": message.use_activation if message.HasField("use_activation") else True,
        "truncate_prompt_tokens": message.truncate_prompt_tokens if has_limit else None,
        "priority": message.priority,
        "client": client_of(message.user),
        "timeout": seconds_left(context.time_remaining()),
    }


def _usage(usage: Usage) -> inference_pb2.Usage:
    return inference_pb2.Usage(prompt_tokens=usage.prompt_tokens, cached_tokens=usage.cached_tokens)
