"""The Embed RPC: its messages and the pipeline's."""

from __future__ import annotations

import math

import grpc

from frontend.caller import client_of
from frontend.embedding import EmbeddingRequest, embed
from frontend.generation.pipeline import GenerationPipeline
from frontend.generation.request import TextPrompt, TokenPrompt, check_request_id, require_at_most
from frontend.pooled import MAX_INPUTS
from pagewire.base.errors import InvalidRequest
from pagewire.inference.v1 import inference_pb2

_POOLINGS = {
    inference_pb2.POOLING_UNSPECIFIED: None,
    inference_pb2.POOLING_LAST: "last",
    inference_pb2.POOLING_MEAN: "mean",
    inference_pb2.POOLING_CLS: "cls",
}


async def answer_embed(
    pipeline: GenerationPipeline, message: inference_pb2.EmbedRequest, context: grpc.aio.ServicerContext
) -> inference_pb2.EmbedResponse:
    """Embeds what the message asks for.

    Raises:
        PagewireError: see `embed`.
    """
    request = _request(message, context.time_remaining())
    embeddings = await embed(pipeline, request)
    usage = embeddings.usage
    return inference_pb2.EmbedResponse(
        request_id=request.request_id,
        embeddings=[inference_pb2.Embedding(values=vector) for vector in embeddings.vectors],
        usage=inference_pb2.Usage(prompt_tokens=usage.prompt_tokens, cached_tokens=usage.cached_tokens),
    )


def _request(message: inference_pb2.EmbedRequest, remaining: float | None) -> EmbeddingRequest:
    if message.pooling not in _POOLINGS:
        raise InvalidRequest(
            f"pooling is {message.pooling}; it must be one of {', '.join(inference_pb2.Pooling.keys())}",
            param="pooling",
        )
    return EmbeddingRequest(
        request_id=check_request_id(message.request_id),
        model=message.model,
        inputs=inputs_of(message),
        pooling=_POOLINGS[message.pooling],
        normalize=message.normalize if message.HasField("normalize") else None,
        dimensions=message.dimensions if message.HasField("dimensions") else None,
        truncate_prompt_tokens=(
            message.truncate_prompt_tokens if message.HasField("truncate_prompt_tokens") else None
        ),
        priority=message.priority,
        client=client_of(message.user),
        timeout=seconds_left(remaining),
    )


def inputs_of(
    message: inference_pb2.EmbedRequest | inference_pb2.ClassifyRequest,
) -> list[TextPrompt | TokenPrompt]:
    """The inputs of a message.

    Raises:
        InvalidRequest: it has both kinds, or too many.
    """
    if message.texts and message.token_ids:
        raise InvalidRequest("set either texts or token_ids", param="texts")
    require_at_most(MAX_INPUTS, len(message.texts) + len(message.token_ids), "texts")
    inputs: list[TextPrompt | TokenPrompt] = [TextPrompt(text=text) for text in message.texts]
    return inputs + [TokenPrompt(token_ids=list(each.ids)) for each in message.token_ids]


def seconds_left(remaining: float | None) -> float | None:
    """Until a call's deadline; None if it has none."""
    return None if remaining is None or math.isinf(remaining) else remaining
