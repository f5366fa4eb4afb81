"""From inputs to vectors: tokenize, submit, and scale the hidden states that come back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from frontend.generation.events import Usage
from frontend.generation.pipeline import Admitted, GenerationPipeline
from frontend.generation.request import TextPrompt, TokenPrompt
from frontend.pooled import PooledRequest, Vector, pool, read_inputs
from pagewire.base.errors import InvalidRequest, Unsupported
from pagewire.wire.tasks import CLASSIFY, EMBED, why_no_embeddings

_LEAST_LENGTH = 1e-12
"""What a vector's length is taken for if it is less, so that nothing is divided by zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRequest(PooledRequest[TextPrompt | TokenPrompt]):
    """Inputs to embed.

    Attributes:
        pooling: "last", "mean" or "cls", or None for the model's own way.
        normalize: whether vectors are scaled to length 1, or None for the model's own way.
        dimensions: how many numbers of each vector are kept, from its beginning; None keeps all.

    Raises:
        InvalidRequest: a value is out of its range.
    """

    pooling: str | None = None
    normalize: bool | None = None
    dimensions: int | None = None

    def __post_init__(self) -> None:
        PooledRequest.__post_init__(self)
        check_dimensions(self.dimensions)


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector for each input, in order, and counts of all inputs together."""

    vectors: list[Vector]
    usage: Usage


async def embed(pipeline: GenerationPipeline, request: EmbeddingRequest) -> Embeddings:
    """Embeds a request's inputs, many at once.

    Raises:
        InvalidRequest, NotFound: the request cannot succeed as sent.
        Unsupported: the model classifies.
        Unavailable: no engine is ready, or this frontend is draining.
        Overloaded: too much is waiting.
        DeadlineExceeded: the timeout is over.
    """
    async with pipeline.admit(request.model, request.timeout) as admitted:
        embeddings = await embed_admitted(pipeline, admitted, request)
        admitted.outcome = "embedded"
        return embeddings


async def embed_admitted(
    pipeline: GenerationPipeline, admitted: Admitted, request: EmbeddingRequest
) -> Embeddings:
    """Embeds the inputs of a request that was let in. Raises as `embed`."""
    own, facts = pipeline.model.embedding, admitted.facts
    if facts.task == CLASSIFY:
        raise Unsupported(why_no_embeddings(), param="model")
    pooling = own.choose(request.pooling, is_decoder_alone=facts.task == EMBED)
    check_dimensions(request.dimensions, facts.hidden_size)
    limit = min(filter(None, (facts.max_model_len, own.max_tokens, pipeline.max_prompt_tokens)))
    token_ids = await admitted.in_time(
        pipeline.in_thread(read_inputs, pipeline.model.tokenizer, request, limit, facts.vocab_size)
    )
    states, usage = await pool(pipeline, admitted, request, token_ids, pooling)
    normalize = own.normalize if request.normalize is None else request.normalize
    vectors = [vector_of(state, request.dimensions, normalize=normalize) for state in states]
    return Embeddings(vectors, usage)


def check_dimensions(dimensions: int | None, hidden_size: int | None = None) -> None:
    """Checks how many numbers of a vector are asked for.

    Args:
        hidden_size: how many there are, if that is known.

    Raises:
        InvalidRequest: there are not as many, or none are asked for.
    """
    if dimensions is None:
        return
    if dimensions < 1:
        raise InvalidRequest(f"dimensions is {dimensions}; it must be at least 1", param="dimensions")
    if hidden_size is not None and dimensions > hidden_size:
        raise InvalidRequest(
            f"dimensions is {dimensions}; this model's vectors have {hidden_size} numbers", param="dimensions"
        )


def vector_of(state: Vector, dimensions: int | None, *, normalize: bool) -> Vector:
    """A vector of a pooled state."""
    vector = state[:dimensions]
    if normalize:
        vector = vector / max(float(np.linalg.norm(vector)), _LEAST_LENGTH)
    return vector.astype(np.float32, copy=False)
