"""OpenAI's response objects, whole and as server-sent events.

A stream's frames differ only in their text, so that a shape renders everything around it once and a frame
costs one JSON escape and one concatenation.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any

from frontend.generation.answer import Answer, WholeAnswer, WholeChoice
from frontend.generation.events import Delta, Event, Finished, PositionLogprobs, PromptRead, Usage
from frontend.http.json_text import json_text
from frontend.text.tokenizer import TextTokenizer

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """What a client wants to see.

    Attributes:
        num_choices: completions in the answer.
        choices_per_prompt: how many of them continue each prompt.
        include_usage: whether a stream ends with a usage frame (and says "usage": null before it).
        continuous_usage: whether every frame has the counts so far.
        echo: whether completions begin with their prompts.
        logprobs: likeliest tokens to name at each position, None for no log probabilities.
        prompt_logprobs: the same for the prompt.
        return_token_ids: whether tokens are told by id too.
    """

    num_choices: int = 1
    choices_per_prompt: int = 1
    include_usage: bool = False
    continuous_usage: bool = False
    echo: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool = False


@dataclass(slots=True)
class _Held:
    """What a choice's tokens have besides text, until there is text to send it with."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)


class ResponseShape(ABC):
    """How one endpoint's answers look. One instance a request."""

    _whole_object: str
    _chunk_object: str

    def __init__(
        self,
        *,
        response_id: str,
        model: str,
        created: int,
        options: AnswerOptions,
        skip_special_tokens: bool,
        tokenizer: TextTokenizer,
    ) -> None:
        self._skip_special_tokens = skip_special_tokens
        self._tokenizer = tokenizer
        self._options = options
        self._base = {"id": response_id, "created": created, "model": model}
        chunk = json.dumps({**self._base, "object": self._chunk_object}, ensure_ascii=False)
        self._prefix = f'data: {chunk[:-1]}, "choices": [{{"index": '
        self._suffix = ', "usage": null' if options.include_usage else ""
        self._opened: dict[int, _Held] = {}
        # Of choices that have begun: what comes before and behind the text of a frame that has only text.
        # Nothing where frames have more than that.
        self._around: dict[int, tuple[str, str]] = {}
        self._only_text = options.logprobs is None and not (
            options.continuous_usage or options.return_token_ids
        )
        self._num_unfinished = options.num_choices

    def whole(self, answer: WholeAnswer) -> dict[str, Any]:
        """The answer to a request without streaming."""
        per_prompt = self._options.choices_per_prompt
        prompts: Sequence[PromptRead | None] = answer.prompts or [None] * (len(answer.choices) // per_prompt)
        return {
            **self._base,
            "object": self._whole_object,
            "choices": [
                {
                    "index": choice.index,
                    **self._content(choice, prompts[choice.index // per_prompt]),
                    "finish_reason": choice.finished.reason.value,
                    "stop_reason": choice.finished.stop_reason,
                    **self._ids(choice.token_ids),
                }
                for choice in answer.choices
            ],
            "usage": usage_object(answer.usage),
            **self._prompt_facts(prompts[0]),
        }

    def frames(self, events: Sequence[Event], answer: Answer) -> bytes:
        """Server-sent events for what came together; at the end also the counts, if wanted, and [DONE]."""
        if len(events) == 1:
            frame = self._text_frame(events[0])
            if frame is not None:
                return frame.encode()
        if self._options.continuous_usage:
            self._suffix = f', "usage": {json_text(usage_object(answer.usage))}'
        frames = []
        for event in events:
            if isinstance(event, Delta):
                frames.append(self._delta(event))
            elif isinstance(event, Finished):
                frames.append(self._end(event))
            else:
                frames.append(self._begin(event))
        rendered = "".join(frames).encode()
        if self._num_unfinished:
            return rendered
        return rendered + self._closing(answer.usage)

    def _text_frame(self, event: Event) -> str | None:
        """The frame of a delta that has nothing but text, as nearly all have, in a choice that has begun."""
        around = self._around.get(event.index)
        if around is None or not isinstance(event, Delta):
            return None
        if not event.text or event.logprobs or event.reasoning or event.tool_calls:
            return None
        return f"{around[0]}{encode_basestring(event.text)}{around[1]}"

    def _closing(self, usage: Usage) -> bytes:
        if not self._options.include_usage:
            return DONE
        body = {**self._base, "object": self._chunk_object, "choices": [], "usage": usage_object(usage)}
        return event_frame(body) + DONE

    def _begin(self, prompt: PromptRead) -> str:
        """Opens all completions of a prompt that is to be seen."""
        per_prompt = self._options.choices_per_prompt
        choices = range(prompt.index * per_prompt, (prompt.index + 1) * per_prompt)
        frames = []
        for index in choices:
            self._opened[index] = _Held()
            frames.append(self._opening(index, prompt))
        return "".join(frames)

    def _open(self, index: int) -> tuple[_Held, str]:
        held = self._opened.get(index)
        if held is not None:
            return held, ""
        held = self._opened[index] = _Held()
        return held, self._opening(index, None)

    def _delta(self, delta: Delta) -> str:
        held, frames = self._opened.get(delta.index), ""
        if held is None:
            held, frames = self._open(delta.index)
        if self._options.return_token_ids:
            held.token_ids += delta.token_ids
        held.logprobs += delta.logprobs
        if delta.text or delta.reasoning or delta.tool_calls:
            frames += self._said(delta, held.token_ids, held.logprobs)
            if held.token_ids or held.logprobs:
                self._opened[delta.index] = _Held()
            elif self._only_text and delta.index not in self._around:
                self._around[delta.index] = self._around_text(delta.index)
        return frames

    def _around_text(self, index: int) -> tuple[str, str]:
        """What is before and behind the text of a choice's frame, cut from one with a text of its own."""
        mark = "\0"  # which JSON has only escaped
        before, _, behind = self._said(Delta([], mark, [], Usage(0, 0, 0), index), (), ()).partition(
            encode_basestring(mark)
        )
        return before, behind

    def _end(self, finished: Finished) -> str:
        held, frames = self._open(finished.index)
        if held.logprobs or held.token_ids:
            last = Delta([], "", [], finished.usage, index=finished.index)
            frames += self._said(last, held.token_ids, held.logprobs)
        self._num_unfinished -= 1
        return frames + self._ending(finished)

    def _frame(self, index: int, choice: str, around: str = "") -> str:
        """One event: the fields of one choice, and perhaps further ones around the choices."""
        return f"{self._prefix}{index}, {choice}}}]{around}{self._suffix}}}\n\n"

    def _reasons(self, finished: Finished) -> str:
        """Why a choice ended, as the end of its last frame."""
        return f'"{finished.reason.value}", "stop_reason": {json_text(finished.stop_reason)}'

    def _ids(self, token_ids: Sequence[int]) -> dict[str, Any]:
        return {"token_ids": list(token_ids)} if self._options.return_token_ids else {}

    def _rendered_ids(self, token_ids: Sequence[int]) -> str:
        return f', "token_ids": {json_text(list(token_ids))}' if self._options.return_token_ids else ""

    def _prompt_facts(self, prompt: PromptRead | None) -> dict[str, Any]:
        """What an answer says of its prompt besides the completions."""
        return {}

    def _prompt_logprobs(self, prompt: PromptRead) -> list[dict[str, Any] | None]:
        """vLLM's form: for each token an object by token id; null for the first."""
        count = self._options.prompt_logprobs or 0
        return [
            None if entry.logprob is None else self._by_id(entry, entry.top[:count])
            for entry in prompt.logprobs
        ]

    def _by_id(self, entry: PositionLogprobs, top: Sequence[tuple[int, float]]) -> dict[str, Any]:
        rank = next((place for place, pair in enumerate(entry.top, 1) if pair[0] == entry.token_id), None)
        ranked = {entry.token_id: (entry.logprob, rank)}
        ranked |= {token_id: (logprob, place) for place, (token_id, logprob) in enumerate(top, 1)}
        return {
            str(token_id): {
                "logprob": logprob,
                "rank": place,
                "decoded_token": self._tokenizer.token_text(token_id),
            }
            for token_id, (logprob, place) in ranked.items()
        }

    @abstractmethod
    def _opening(self, index: int, prompt: PromptRead | None) -> str:
        """What comes before a choice's first text."""

    @abstractmethod
    def _said(self, delta: Delta, token_ids: Sequence[int], logprobs: Sequence[PositionLogprobs]) -> str:
        """More text; ids and log probabilities are those of all tokens since the last one."""

    @abstractmethod
    def _ending(self, finished: Finished) -> str:
        """The frame with the finish reason."""

    @abstractmethod
    def _content(self, choice: WholeChoice, prompt: PromptRead | None) -> dict[str, Any]:
        """The choice's text and log probabilities."""


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def event_frame(value: object) -> bytes:
    """One server-sent event."""
    return b"data: " + json_text(value).encode() + b"\n\n"
