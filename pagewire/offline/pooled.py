"""Classifications, scores and vectors without a server."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.dispatch.facts import WorkerFacts
from engine.dispatch.sampling import Pooling
from frontend.embedding import check_dimensions, vector_of
from frontend.generation.request import TextPrompt, TokenPrompt
from frontend.pooled import MAX_INPUTS, Input, PooledRequest, TextPair, Vector, read_inputs
from frontend.served_model import ServedModel
from pagewire.base.errors import PagewireError, Unsupported
from pagewire.offline.engine import OfflineEngine
from pagewire.offline.outputs import ClassificationOutput
from pagewire.wire.sampling_params import SamplingParams
from pagewire.wire.tasks import CLASSIFY, EMBED, why_no_embeddings
from scheduler.request import EndReason
from scheduler.serve.intake import make_request

Vectors = npt.NDArray[np.float32]
"""[inputs, numbers of a vector]"""

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


def classify(
    engine: OfflineEngine, model: ServedModel, prompts: Prompts, *, use_activation: bool
) -> list[ClassificationOutput]:
    """See `LLM.classify`."""
    labels = _labels(engine.facts, "classify texts")
    rows = _pool(engine, model, _inputs(prompts))
    if use_activation:
        rows = list(map(model.scoring.probabilities, rows))
    return [ClassificationOutput(labels[int(row.argmax())], row.tolist()) for row in rows]


def score(
    engine: OfflineEngine, model: ServedModel, pairs: Sequence[TextPair], *, use_activation: bool
) -> list[float]:
    """See `LLM.score`."""
    labels = _labels(engine.facts, "score pairs of texts")
    if len(labels) != 1:
        raise Unsupported(
            f"this model has {len(labels)} classes; pairs are scored by models with one. Use classify()",
            param="model",
        )
    logits = [float(row[0]) for row in _pool(engine, model, pairs)]
    return [model.scoring.score(each) for each in logits] if use_activation else logits


def embed(
    engine: OfflineEngine,
    model: ServedModel,
    prompts: Prompts,
    *,
    pooling: str | None,
    normalize: bool | None,
    dimensions: int | None,
) -> Vectors:
    """See `LLM.embed`."""
    facts, own = engine.facts, model.embedding
    if facts.task == CLASSIFY:
        raise Unsupported(why_no_embeddings(), param="model")
    how = Pooling(own.choose(pooling, is_decoder_alone=facts.task == EMBED))
    check_dimensions(dimensions, facts.limits.hidden_size)
    states = _pool(engine, model, _inputs(prompts), how, own.max_tokens)
    scaled = own.normalize if normalize is None else normalize
    return np.array([vector_of(state, dimensions, normalize=scaled) for state in states])


def _labels(facts: WorkerFacts, wanted: str) -> tuple[str, ...]:
    if facts.task != CLASSIFY:
        raise Unsupported(
            f"this model has no classification head, so it cannot {wanted}: that takes a checkpoint whose "
            "architecture is named ...ForSequenceClassification",
            param="model",
        )
    return facts.labels


def _inputs(prompts: Prompts) -> list[TextPrompt | TokenPrompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        prompts = [prompts]  # type: ignore[assignment]
    return [
        TextPrompt(text=each) if isinstance(each, str) else TokenPrompt(token_ids=each)  # type: ignore[arg-type]
        for each in prompts
    ]


def _pool(
    engine: OfflineEngine,
    model: ServedModel,
    inputs: Sequence[Input],
    pooling: Pooling = Pooling.LAST,
    max_tokens: int | None = None,
) -> list[Vector]:
    """The pooled states of each input, or what the model's head makes of them.

    Args:
        max_tokens: the longest input that is taken; None for what the model's context holds.

    Raises:
        InvalidRequest: an input is wrong; nothing is computed then.
        Unavailable: the worker died.
    """
    limits = engine.facts.limits
    longest = min(filter(None, (limits.max_model_len, max_tokens)))
    token_ids: list[Sequence[int]] = []
    for begin in range(0, len(inputs), MAX_INPUTS):
        part = PooledRequest(request_id="", model="", inputs=inputs[begin : begin + MAX_INPUTS])
        token_ids += read_inputs(model.tokenizer, part, longest, limits.vocab_size)
    requests = [
        make_request(f"pooled-{number}", ids, SamplingParams(), engine.facts, pooling=pooling)
        for number, ids in enumerate(token_ids)
    ]
    for request in requests:
        engine.check(request)
    states: dict[str, Vector] = {}
    try:
        for request in requests:
            engine.add(request)
        for step in engine.steps():
            states.update((request.request_id, np.array(state)) for request, state in step.pooled)
    finally:
        engine.abort(requests)
    failed = next((request for request in requests if request.end_reason is EndReason.ERROR), None)
    if failed is not None:
        raise PagewireError(failed.error)
    return [states[request.request_id] for request in requests]
