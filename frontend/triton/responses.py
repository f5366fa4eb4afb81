"""Answers as the tensors of Triton's responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frontend.generation.answer import WholeAnswer, WholeChoice
from frontend.generation.events import Delta, Event, Finished, PositionLogprobs
from frontend.triton.request import Inference
from frontend.triton.tensors import Tensor


@dataclass(frozen=True, slots=True)
class Response:
    """One response.

    Attributes:
        outputs: its tensors, only those that were asked for.
        is_final: whether it is the last of its request.
    """

    outputs: Sequence[Tensor]
    is_final: bool


class Responses:
    """Makes the responses to one request.

    Attributes:
        parameters: what every response tells besides its outputs.
    """

    def __init__(self, inference: Inference) -> None:
        self._inference = inference
        self._outputs = inference.outputs
        self._per_prompt = inference.request.sampling.n
        self._num_unfinished = inference.request.num_choices
        self._sums: dict[int, float] = {}
        given = inference.asked.parameters
        self.parameters: Mapping[str, Any] = {
            "sequence_id": _sequence_id(given.get("sequence_id")),
            "sequence_start": bool(given.get("sequence_start", False)),
            "sequence_end": bool(given.get("sequence_end", False)),
        }

    def whole(self, whole: WholeAnswer) -> Response:
        """All completions in one response."""
        return Response(self._tensors(whole, whole.choices), is_final=True)

    def each(self, whole: WholeAnswer) -> list[Response]:
        """A response for each completion, or for all beams of a prompt, and the empty one if it is wanted."""
        size = self._per_prompt if self._inference.has_beams else 1
        groups = [whole.choices[start : start + size] for start in range(0, len(whole.choices), size)]
        return self._ended([self._tensors(whole, group) for group in groups])

    def deltas(self, events: Sequence[Event]) -> list[Response]:
        """The responses for events that came together."""
        made: list[Sequence[Tensor]] = []
        for event in events:
            if isinstance(event, Delta):
                made.append(self._of_delta(event))
            elif isinstance(event, Finished):
                self._num_unfinished -= 1
                last = event
        if self._num_unfinished:
            return [Response(outputs, is_final=False) for outputs in made]
        if not made and not self._inference.empty_final:
            made.append(self._of_delta(Delta([], "", [], last.usage, last.index)))
        return self._ended(made)

    def _ended(self, made: Sequence[Sequence[Tensor]]) -> list[Response]:
        """The last responses of a request."""
        if self._inference.empty_final:
            return [*(Response(outputs, is_final=False) for outputs in made), Response((), is_final=True)]
        return [Response(outputs, is_final=number == len(made)) for number, outputs in enumerate(made, 1)]

    def _tensors(self, whole: WholeAnswer, choices: Sequence[WholeChoice]) -> list[Tensor]:
        """Some completions of an answer."""
        count, per_prompt = len(choices), self._per_prompt
        texts = [choice.text for choice in choices]
        if whole.prompts:
            texts = [whole.prompts[choice.index // per_prompt].text + choice.text for choice in choices]
        logprobs = [_logprobs(choice.logprobs) for choice in choices]
        longest = max(map(len, logprobs))
        padded = [value for row in logprobs for value in row + [0.0] * (longest - len(row))]
        usages = [choice.finished.usage for choice in choices]
        return self._wanted(
            Tensor("text_output", "BYTES", (count,), texts),
            Tensor("cum_log_probs", "FP32", (1, count), [sum(row) for row in logprobs]),
            Tensor("output_log_probs", "FP32", (1, count, longest), padded),
            Tensor("sequence_index", "INT32", (count, 1), [each.index % per_prompt for each in choices]),
            Tensor("batch_index", "INT32", (count, 1), [each.index // per_prompt for each in choices]),
            Tensor("num_input_tokens", "INT32", (count, 1), [usage.prompt_tokens for usage in usages]),
            Tensor("num_output_tokens", "INT32", (1, count), [len(each.token_ids) for each in choices]),
        )

    def _of_delta(self, delta: Delta) -> Sequence[Tensor]:
        """What a completion gained; sums and counts are of all of it so far."""
        text = Tensor("text_output", "BYTES", (1,), (delta.text,))
        if len(self._outputs) == 1 and "text_output" in self._outputs:
            return (text,)
        logprobs, index = _logprobs(delta.logprobs), delta.index
        self._sums[index] = self._sums.get(index, 0.0) + sum(logprobs)
        return self._wanted(
            text,
            Tensor("cum_log_probs", "FP32", (1, 1), (self._sums[index],)),
            Tensor("output_log_probs", "FP32", (1, 1, len(logprobs)), logprobs),
            Tensor("sequence_index", "INT32", (1, 1), (index % self._per_prompt,)),
            Tensor("batch_index", "INT32", (1, 1), (index // self._per_prompt,)),
            Tensor("num_input_tokens", "INT32", (1, 1), (delta.usage.prompt_tokens,)),
            Tensor("num_output_tokens", "INT32", (1, 1), (delta.usage.completion_tokens,)),
        )

    def _wanted(self, *tensors: Tensor) -> list[Tensor]:
        return [tensor for tensor in tensors if tensor.name in self._outputs]


def _sequence_id(given: object) -> int | str:
    return given if isinstance(given, int | str) and not isinstance(given, bool) else 0


def _logprobs(positions: Sequence[PositionLogprobs]) -> list[float]:
    return [position.logprob or 0.0 for position in positions]
