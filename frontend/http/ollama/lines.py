"""Answers of /api/chat and /api/generate: whole, and as lines of a stream.

A stream's lines differ mostly in their text alone, so that what is around it is rendered once and a line
costs one JSON escape and one concatenation.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from json.encoder import encode_basestring
from typing import Any, TypeGuard

from frontend.generation.answer import Answer, WholeAnswer
from frontend.generation.events import (
    Delta,
    Event,
    Finished,
    FinishReason,
    PositionLogprobs,
    Usage,
)
from frontend.generation.message_parser import ToolCallDelta
from frontend.http.ollama.replies import json_text
from frontend.text.tokenizer import TextTokenizer
from pagewire.base.errors import Unavailable

_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.TOOL_CALLS: "stop",
    FinishReason.LENGTH: "length",
}


@dataclass(slots=True)
class Times:
    """When a request was where, by `time.perf_counter`.

    Attributes:
        arrived: read by the frontend.
        submitted: handed to the scheduler; until then it was prepared, or waited for an engine.
    """

    arrived: float = field(default_factory=time.perf_counter)
    submitted: float = 0.0

    def submit(self) -> None:
        """Notes that the request was handed over just now."""
        self.submitted = time.perf_counter()

    def durations(self, usage: Usage, first_token_at: float | None) -> dict[str, int]:
        """Ollama's counts and durations of a request that ends now, in nanoseconds. None is 0, as clients
        divide by them."""
        now = time.perf_counter()
        first = now if first_token_at is None else first_token_at
        return {
            "total_duration": _nanoseconds(now - self.arrived),
            "load_duration": _nanoseconds(self.submitted - self.arrived),
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(first - self.submitted),
            "eval_count": usage.completion_tokens,
            "eval_duration": _nanoseconds(now - first),
        }


class AnswerLines(ABC):
    """How one endpoint's answers look. One instance a request."""

    def __init__(
        self, *, model: str, times: Times, tokenizer: TextTokenizer, with_context: bool = False
    ) -> None:
        """Args:
        model: its name as the client wrote it.
        times: of the request; `submitted` is set once it is.
        tokenizer: names the tokens of log probabilities.
        with_context: whether the last line has the tokens of prompt and answer.
        """
        self._base = {"model": model, "created_at": timestamp()}
        self._times = times
        self._tokenizer = tokenizer
        self._prefix = json_text(self._base)[:-1]
        self._before, _, self._behind = self._line(self._said("\0", "", [])).partition(
            encode_basestring("\0")
        )
        self._calls = _Calls()
        self._context: list[int] | None = [] if with_context else None

    def lines(self, events: Sequence[Event], answer: Answer) -> bytes:
        """The lines for what came together; none if that says nothing.

        Raises:
            Unavailable: the answer was cut off by the server's end.
        """
        if self._context is not None:
            for event in events:
                if not isinstance(event, Finished):
                    self._context += event.token_ids
        if len(events) == 1 and self._is_text(events[0]):
            return f"{self._before}{encode_basestring(events[0].text)}{self._behind}".encode()
        rendered = []
        for event in events:
            if isinstance(event, Delta):
                rendered.append(self._delta(event))
            elif isinstance(event, Finished):
                rendered.append(self._end(event, answer.first_token_at))
        return "".join(rendered).encode()

    def whole(self, answer: WholeAnswer, first_token_at: float | None) -> dict[str, Any]:
        """The answer to a request without streaming.

        Raises:
            Unavailable: as `lines`.
        """
        [choice] = answer.choices
        done = self._done(choice.finished, first_token_at)
        text = choice.text
        calls = []
        for call in choice.tool_calls:
            said, cut_off = _called(call)
            calls += said
            text += cut_off
        for prompt in answer.prompts if self._context is not None else ():
            self._context = [*prompt.token_ids, *choice.token_ids]
        return {
            **self._base,
            **self._said(text, choice.reasoning, calls),
            **self._logprobs(choice.logprobs),
            **done,
            **self._told_context(),
        }

    def empty(self, reason: str) -> dict[str, Any]:
        """The answer to a request that only loads or unloads the model."""
        return {**self._base, **self._said("", "", []), "done": True, "done_reason": reason}

    def _is_text(self, event: Event) -> TypeGuard[Delta]:
        """Whether an event has text and nothing else that a line would tell, as nearly all have."""
        return (
            isinstance(event, Delta)
            and event.text != ""
            and not (event.logprobs or event.reasoning or event.tool_calls or self._calls.growing)
        )

    def _delta(self, delta: Delta) -> str:
        text = delta.text
        calls: list[dict[str, Any]] = []
        for call in self._calls.ended_by(delta.tool_calls):
            said, cut_off = _called(call)
            calls += said
            text += cut_off
        if not (text or delta.reasoning or calls or delta.logprobs):
            return ""
        return self._line({**self._said(text, delta.reasoning, calls), **self._logprobs(delta.logprobs)})

    def _end(self, finished: Finished, first_token_at: float | None) -> str:
        done = self._done(finished, first_token_at)
        rendered = ""
        for call in self._calls.ended():
            said, cut_off = _called(call)
            rendered += self._line(self._said(cut_off, "", said))
        last = {**self._base, **self._said("", "", []), **done, **self._told_context()}
        return f"{rendered}{json_text(last)}\n"

    def _done(self, finished: Finished, first_token_at: float | None) -> dict[str, Any]:
        reason = _REASONS.get(finished.reason)
        if reason is None:
            raise Unavailable(
                "the answer was cut off because this server is shutting down; send the request again"
            )
        durations = self._times.durations(finished.usage, first_token_at)
        return {"done": True, "done_reason": reason, **durations}

    def _line(self, said: dict[str, Any]) -> str:
        return f'{self._prefix},{json_text(said)[1:-1]},"done":false}}\n'

    def _logprobs(self, positions: Sequence[PositionLogprobs]) -> dict[str, Any]:
        if not positions:
            return {}
        told = []
        for position in positions:
            entry = self._token(position.token_id, position.logprob)
            if position.top:
                entry["top_logprobs"] = [self._token(*candidate) for candidate in position.top]
            told.append(entry)
        return {"logprobs": told}

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._tokenizer.token_text(token_id),
            "logprob": logprob,
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }

    def _told_context(self) -> dict[str, Any]:
        return {} if self._context is None else {"context": self._context}

    @abstractmethod
    def _said(self, text: str, thinking: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        """What the model said, in the endpoint's fields; the text comes last but for what is empty."""


class ChatLines(AnswerLines):
    """/api/chat: a message."""

    def _said(self, text: str, thinking: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if thinking:
            message["thinking"] = thinking
        if calls:
            message["tool_calls"] = calls
        return {"message": message}


class GenerateLines(AnswerLines):
    """/api/generate: a text."""

    def _said(self, text: str, thinking: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        return {"response": text, "thinking": thinking} if thinking else {"response": text}


class _Calls:
    """Puts calls together, of which Ollama's streams have only whole ones.

    Attributes:
        growing: the call that may get more arguments yet, if there is one.
    """

    __slots__ = ("growing",)

    def __init__(self) -> None:
        self.growing: ToolCallDelta | None = None

    def ended_by(self, deltas: Sequence[ToolCallDelta]) -> list[ToolCallDelta]:
        """Takes more of the calls; those that are whole because another one has begun."""
        ended = []
        for delta in deltas:
            growing = self.growing
            if growing is not None and growing.index == delta.index:
                arguments = growing.arguments + delta.arguments
                self.growing = ToolCallDelta(growing.index, growing.id, growing.name, arguments)
                continue
            ended += self.ended()
            self.growing = delta
        return ended

    def ended(self) -> list[ToolCallDelta]:
        """The call that was growing, if one was, as no more comes of it."""
        growing, self.growing = self.growing, None
        return [] if growing is None else [growing]


def _called(call: ToolCallDelta) -> tuple[list[dict[str, Any]], str]:
    """A call in Ollama's form, or text: the arguments of one that was cut off are no object, and nobody is to
    execute it."""
    try:
        arguments = json.loads(call.arguments or "{}")
        json.dumps(arguments, allow_nan=False)  # which are numbers for Python only
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        return [], f'{{"name": {json_text(call.name)}, "arguments": {call.arguments}'
    function = {"index": call.index, "name": call.name, "arguments": arguments}
    return [{"id": call.id, "function": function}], ""


def timestamp(moment: datetime | None = None) -> str:
    """A moment, by default now, as Ollama writes it."""
    told = datetime.now(UTC) if moment is None else moment
    return told.isoformat().replace("+00:00", "Z")


def _nanoseconds(seconds: float) -> int:
    return max(1, round(seconds * 1e9))
