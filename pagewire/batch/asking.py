"""Samples of a data set, asked of a server."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pagewire.base.errors import NotFound, Overloaded, PagewireError, Unauthenticated, Unavailable
from pagewire.batch.dataset import Sample
from pagewire.client import AsyncClient, Completion

_OF_THE_SERVER = (NotFound, Overloaded, Unauthenticated, Unavailable)
"""Errors that the next line would end with, too."""
_SCORING = {"max_tokens": 0, "prompt_logprobs": 0}


@dataclass(frozen=True, slots=True)
class Asked:
    """What came of a sample.

    Attributes:
        line: of the results.
        num_tokens: how many were generated.
        failed: whether it is about an error.
    """

    line: bytes
    num_tokens: int = 0
    failed: bool = False


class Asker:
    """Asks samples of a model.

    Args:
        client: of the server.
        model: the name there.
        sampling: parameters given, by SamplingParams field.
    """

    def __init__(self, client: AsyncClient, model: str, sampling: Mapping[str, Any]) -> None:
        self._client, self._model, self._sampling = client, model, sampling

    async def respond(self, sample: Sample) -> Asked:
        """Has a sample answered.

        Raises:
            PagewireError: the server is away, full or refuses everything.
        """
        if sample.error is not None:
            return _failed(sample, sample.error)
        if sample.text is not None:
            return _failed(sample, 'it has "text" alone, which only --metric ppl takes')
        try:
            answer = await self._client.generate(
                messages=sample.messages, sampling_params=self._sampling, model=self._model
            )
        except _OF_THE_SERVER:
            raise
        except PagewireError as error:
            return _failed(sample, error.message)
        return Asked(sample.result(answer.text), answer.finished.usage.completion_tokens)

    async def score(self, sample: Sample) -> Asked:
        """Finds out how likely the model thinks a sample's labels are, after its turns; of a text, each token
        but the first after those before.

        Raises:
            PagewireError: the server is away, full or refuses everything.
        """
        if sample.error is not None:
            return _failed(sample, sample.error)
        if sample.text is None and not sample.labels:
            return _failed(sample, "it has no response to score")
        try:
            if sample.text is not None:
                logprobs = await self._of_text(sample.text)
            else:
                logprobs = await self._of_labels(sample)
        except _OF_THE_SERVER:
            raise
        except PagewireError as error:
            return _failed(sample, error.message)
        if not logprobs:
            return _failed(sample, "it has no token to score")
        total, count = sum(logprobs), len(logprobs)
        line = sample.result(None, logprob=total, num_tokens=count, perplexity=math.exp(-total / count))
        return Asked(line)

    async def _of_text(self, text: str) -> list[float]:
        answer = await self._client.generate(text, _SCORING, model=self._model)
        return _logprobs(answer, 1)

    async def _of_labels(self, sample: Sample) -> list[float]:
        opened = await self._client.tokenize(messages=sample.messages)
        turns = [*sample.messages, {"role": "assistant", "content": sample.labels}]
        answer = await self._client.generate(
            messages=turns,
            add_generation_prompt=False,
            continue_final_message=True,
            sampling_params=_SCORING,
            model=self._model,
        )
        return _logprobs(answer, _num_common(opened, list(answer.prompt.token_ids)))


def _failed(sample: Sample, message: str) -> Asked:
    where = f"line {sample.line.number}"
    error = message if message.startswith(where) else f"{where}: {message}"
    return Asked(sample.result(None, error=error), failed=True)


def _logprobs(answer: Completion, start: int) -> list[float]:
    """Those of the prompt's tokens from a place on."""
    if not answer.prompt.logprobs:
        raise PagewireError("the server sent no log probabilities of the prompt")
    return [each.sampled.logprob for each in answer.prompt.logprobs[max(start, 1) :]]


def _num_common(first: list[int], second: list[int]) -> int:
    """How many tokens two prompts have in common at their beginning."""
    for number, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return number
    return min(len(first), len(second))
