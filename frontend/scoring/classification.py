"""From texts to probabilities of classes, by a model with a classification head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from frontend.generation.events import Usage
from frontend.generation.pipeline import GenerationPipeline
from frontend.generation.request import TextPrompt, TokenPrompt
from frontend.pooled import PooledRequest, Vector, pool, read_inputs
from pagewire.base.errors import Unsupported
from pagewire.inference.v1 import inference_pb2
from pagewire.wire.tasks import CLASSIFY


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationRequest(PooledRequest[TextPrompt | TokenPrompt]):
    """Inputs to classify.

    Attributes:
        use_activation: whether probabilities are wanted; otherwise the logits.
    """

    use_activation: bool = True


@dataclass(frozen=True, slots=True)
class Classifications:
    """A number for each class of each input, in order.

    Attributes:
        labels: the classes' names.
        rows: of each input, a number for each class.
        usage: counts of all inputs together.
    """

    labels: Sequence[str]
    rows: Sequence[Vector]
    usage: Usage

    def best(self, row: Vector) -> str:
        """The likeliest class's name."""
        return self.labels[int(row.argmax())]


async def classify(pipeline: GenerationPipeline, request: ClassificationRequest) -> Classifications:
    """Classifies a request's inputs, many at once.

    Raises:
        InvalidRequest, NotFound: the request cannot succeed as sent.
        Unsupported: the model has no classification head.
        Unavailable: no engine is ready, or this frontend is draining.
        Overloaded: too much is waiting.
        DeadlineExceeded: the timeout is over.
    """
    async with pipeline.admit(request.model, request.timeout) as admitted:
        model, facts = pipeline.model, admitted.facts
        if facts.task != CLASSIFY:
            raise Unsupported(
                f"the model {model.names[0]!r} has no classification head, so it cannot classify texts: "
                "that takes an architecture named ...ForSequenceClassification (docs/scoring.md)",
                param="model",
            )
        limit = min(filter(None, (facts.max_model_len, pipeline.max_prompt_tokens)))
        token_ids = await admitted.in_time(
            pipeline.in_thread(read_inputs, model.tokenizer, request, limit, facts.vocab_size)
        )
        logits, usage = await pool(pipeline, admitted, request, token_ids, inference_pb2.POOLING_LAST)
        rows = [model.scoring.probabilities(each) if request.use_activation else each for each in logits]
        admitted.outcome = "classified"
        return Classifications(tuple(facts.labels), rows, usage)
