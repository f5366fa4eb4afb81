"""The best of several sampled completions. They are compared, and so told, at the end."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from frontend.generation.answer import Answer, SampledAnswer, Sink, WholeChoice
from frontend.generation.events import Delta, Event, Finished, Usage


class RankedAnswer(Answer):
    """The `n` of every prompt's completions that have the highest mean log probability."""

    def __init__(self, sampled: SampledAnswer, *, best_of: int, n: int, with_logprobs: bool) -> None:
        """Args:
        sampled: `best_of` completions of each prompt, with log probabilities.
        best_of: how many there are to choose from.
        n: how many to keep.
        with_logprobs: whether the client wants the log probabilities.
        """
        super().__init__(sampled.request_id)
        self._sampled = sampled
        self._best_of = best_of
        self._n = n
        self._with_logprobs = with_logprobs

    @property
    def first_token_at(self) -> float | None:
        return self._sampled.first_token_at

    @property
    def usage(self) -> Usage:
        return self._sampled.usage

    async def rounds(self, sink: Sink | None = None) -> AsyncGenerator[list[Event], None]:
        whole = await self._sampled.whole()
        prompts: Sequence[Event | None] = whole.prompts or [None] * (len(whole.choices) // self._best_of)
        events: list[Event] = []
        for number, prompt in enumerate(prompts):
            events += [] if prompt is None else [prompt]
            choices = whole.choices[number * self._best_of : (number + 1) * self._best_of]
            choices.sort(
                key=lambda choice: -mean_logprob([entry.logprob or 0.0 for entry in choice.logprobs])
            )
            for index, choice in enumerate(choices[: self._n], number * self._n):
                events += self._told(choice, index)
        self.finished = next(event for event in events if isinstance(event, Finished))
        yield events

    def _told(self, choice: WholeChoice, index: int) -> list[Event]:
        end = choice.finished
        delta = Delta(
            choice.token_ids,
            choice.text,
            choice.logprobs if self._with_logprobs else [],
            end.usage,
            index,
            choice.reasoning,
            tuple(choice.tool_calls),
        )
        score = sum(entry.logprob or 0.0 for entry in choice.logprobs)
        return [
            delta,
            Finished(end.reason, end.usage, end.stop_string, end.stop_token_id, index=index, score=score),
        ]


def mean_logprob(logprobs: Sequence[float]) -> float:
    """By what completions are ranked: the sum favours short ones. Nothing generated is as good as certain."""
    return sum(logprobs) / max(len(logprobs), 1)
