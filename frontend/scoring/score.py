"""How well two texts go together: by a cross-encoder's one class, by what a generator answers, or by the
vectors of an embedding model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from frontend.embedding import EmbeddingRequest, embed_admitted
from frontend.generation.events import Usage
from frontend.generation.open_request import Submission
from frontend.generation.pipeline import Admitted, GenerationPipeline
from frontend.generation.request import TextPrompt
from frontend.pooled import MAX_INPUTS, PooledRequest, TextPair, Vector, at_once, pool, run_all, usage_of
from frontend.scoring.facts import sigmoid
from frontend.scoring.pairs import read_pairs
from pagewire.base.errors import InvalidRequest, PagewireError, Unsupported
from pagewire.inference.v1 import inference_pb2
from pagewire.scheduler.v1 import scheduler_pb2
from pagewire.wire.tasks import CLASSIFY, EMBED


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest(PooledRequest[TextPair]):
    """Pairs of texts to score.

    Attributes:
        use_activation: whether scores between 0 and 1 are wanted; otherwise the logits.
    """

    use_activation: bool = True


@dataclass(frozen=True, slots=True)
class Scores:
    """A score for each pair, in order, and counts of all pairs together."""

    values: Sequence[float]
    usage: Usage


def pair_up(first: Sequence[str], second: Sequence[str], names: tuple[str, str]) -> list[TextPair]:
    """One text with each of the second ones, or as many first as second ones with each other.

    Args:
        names: of both fields, for errors.

    Raises:
        InvalidRequest: their numbers do not fit, or there are too many.
    """
    for texts, name in zip((first, second), names, strict=True):
        if not 1 <= len(texts) <= MAX_INPUTS or not all(texts):
            raise InvalidRequest(
                f"{name} must be a list of 1 to {MAX_INPUTS} texts of at least one character", param=name
            )
    if len(first) not in (1, len(second)):
        raise InvalidRequest(
            f"{names[0]} has {len(first)} texts and {names[1]} {len(second)}; it must have 1 or as many",
            param=names[0],
        )
    firsts = [first[0]] * len(second) if len(first) == 1 else first
    return [TextPair(first=each, second=other) for each, other in zip(firsts, second, strict=True)]


async def score(pipeline: GenerationPipeline, request: ScoreRequest) -> Scores:
    """Scores a request's pairs, many at once.

    Raises:
        InvalidRequest, NotFound: the request cannot succeed as sent.
        Unsupported: the model does not score.
        Unavailable: no engine is ready, or this frontend is draining.
        Overloaded: too much is waiting.
        DeadlineExceeded: the timeout is over.
    """
    async with pipeline.admit(request.model, request.timeout) as admitted:
        facts, model = admitted.facts, pipeline.model
        if facts.task == CLASSIFY:
            scores = await _by_head(pipeline, admitted, request)
        elif model.scoring.tokens is not None:
            scores = await _by_tokens(pipeline, admitted, request, *model.scoring.tokens)
        elif facts.task == EMBED or (model.embedding.pooling and not model.embedding.obstacle):
            scores = await _by_vectors(pipeline, admitted, request)
        else:
            raise Unsupported(
                f"the model {model.names[0]!r} has no classification head, so it cannot score or rank texts: "
                "that takes a cross-encoder (an architecture named ...ForSequenceClassification, with one "
                "class), an embedding model, or a server that was started with --classifier-from-token "
                "(docs/scoring.md)",
                param="model",
            )
        admitted.outcome = "scored"
        return scores


async def _by_head(pipeline: GenerationPipeline, admitted: Admitted, request: ScoreRequest) -> Scores:
    labels = admitted.facts.labels
    if len(labels) != 1:
        raise Unsupported(
            f"this model has {len(labels)} classes; pairs are scored by models with one. Ask it to classify "
            "texts (/v1/classify)",
            param="model",
        )
    token_ids = await _read(pipeline, admitted, request)
    logits, usage = await pool(pipeline, admitted, request, token_ids, inference_pb2.POOLING_LAST)
    values = [float(each[0]) for each in logits]
    if request.use_activation:
        values = list(map(pipeline.model.scoring.score, values))
    return Scores(values, usage)


async def _by_tokens(
    pipeline: GenerationPipeline, admitted: Admitted, request: ScoreRequest, no: int, yes: int
) -> Scores:
    """By the log probabilities of the tokens that say no and yes after the pair. Each is asked for by a
    request that may generate nothing else; the second finds the first one's blocks."""
    token_ids = await _read(pipeline, admitted, request)
    logprobs, usage = [], None
    for token_id in (no, yes):
        submissions = [
            Submission(
                request_id=f"{request.request_id}-{number}" if number else request.request_id,
                prompt_ids=ids,
                sampling=inference_pb2.SamplingParams(
                    temperature=0,
                    seed=0,
                    max_tokens=1,
                    logprobs=0,
                    ignore_eos=True,
                    allowed_token_ids=[token_id],
                ),
                priority=request.priority,
                client=request.client,
                deadline=admitted.deadline,
                part=number,
            )
            for number, ids in enumerate(token_ids)
        ]
        ended = await run_all(pipeline.link, submissions, at_once(admitted))
        usage = usage or usage_of(ended)
        logprobs.append([_logprob(each.take()[1]) for each in ended])
    differences = np.array(logprobs[1], np.float32) - np.array(logprobs[0], np.float32)
    values = sigmoid(differences) if request.use_activation else differences
    assert usage is not None
    return Scores(values.tolist(), usage)


def _logprob(told: Sequence[scheduler_pb2.TokenLogprobs]) -> float:
    if len(told) != 1:
        raise PagewireError("the scheduler ended a request without the log probability of its token")
    value = float(told[0].logprob)
    if not math.isfinite(value):
        raise PagewireError("the model's log probabilities have numbers that are not finite")
    return value


async def _by_vectors(pipeline: GenerationPipeline, admitted: Admitted, request: ScoreRequest) -> Scores:
    """The cosine of the texts' vectors; each text is embedded once."""
    texts = list(dict.fromkeys(text for pair in request.inputs for text in (pair.first, pair.second)))
    usage = Usage(0, 0, 0)
    vectors: dict[str, Vector] = {}
    for begin in range(0, len(texts), MAX_INPUTS):
        part = texts[begin : begin + MAX_INPUTS]
        embeddings = await embed_admitted(
            pipeline,
            admitted,
            EmbeddingRequest(
                request_id=request.request_id,
                model=request.model,
                inputs=[TextPrompt(text=text) for text in part],
                normalize=True,
                truncate_prompt_tokens=request.truncate_prompt_tokens,
                priority=request.priority,
                client=request.client,
            ),
        )
        vectors.update(zip(part, embeddings.vectors, strict=True))
        usage = replace(
            usage,
            prompt_tokens=usage.prompt_tokens + embeddings.usage.prompt_tokens,
            cached_tokens=usage.cached_tokens + embeddings.usage.cached_tokens,
        )
    return Scores([float(vectors[pair.first] @ vectors[pair.second]) for pair in request.inputs], usage)


async def _read(
    pipeline: GenerationPipeline, admitted: Admitted, request: ScoreRequest
) -> list[Sequence[int]]:
    facts, model = admitted.facts, pipeline.model
    limit = min(filter(None, (facts.max_model_len, pipeline.max_prompt_tokens)))
    if model.scoring.tokens is not None:
        limit = min(limit, facts.max_model_len - 1)  # one is generated
    return await admitted.in_time(
        pipeline.in_thread(
            read_pairs, model.tokenizer, model.scoring.template, request, limit, facts.vocab_size
        )
    )
