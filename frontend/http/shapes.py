"""OpenAI's response objects, whole and as server-sent events.

A stream's frames differ only in their text, so that a shape renders everything around it once and a frame
costs one JSON escape and one concatenation.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from json.encoder import encode_basestring
from typing import Any

from frontend.completion import PositionLogprobs, Usage, WholeCompletion
from frontend.text.tokenizer import TextTokenizer

DONE = b"data: [DONE]\n\n"


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
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


class ResponseShape(ABC):
    """How one endpoint's answers look. One instance a request."""

    _whole_object: str
    _chunk_object: str

    def __init__(
        self, *, response_id: str, model: str, created: int, with_usage: bool, tokenizer: TextTokenizer
    ) -> None:
        """Args:
        with_usage: whether a stream ends with a usage frame (and says "usage": null before it).
        """
        self._tokenizer = tokenizer
        self._base = {"id": response_id, "created": created, "model": model}
        chunk = json.dumps({**self._base, "object": self._chunk_object}, ensure_ascii=False)
        self._prefix = f'data: {chunk[:-1]}, "choices": [{{"index": 0, '
        self._suffix = "}]" + (', "usage": null' if with_usage else "") + "}\n\n"

    def whole(self, completion: WholeCompletion) -> dict[str, Any]:
        """The answer to a request without streaming."""
        choice = {"index": 0, **self._content(completion), "finish_reason": completion.finished.reason.value}
        return {
            **self._base,
            "object": self._whole_object,
            "choices": [choice],
            "usage": usage_object(completion.finished.usage),
        }

    def usage_frame(self, usage: Usage) -> bytes:
        """The frame with the counts, which has no choice in it."""
        body = {**self._base, "object": self._chunk_object, "choices": [], "usage": usage_object(usage)}
        return event_frame(body)

    def opening_frame(self) -> bytes:
        """What comes before the first text."""
        return b""

    @abstractmethod
    def text_frame(self, text: str, logprobs: Sequence[PositionLogprobs]) -> bytes:
        """More text."""

    @abstractmethod
    def closing_frame(self, reason: str) -> bytes:
        """The frame with the finish reason."""

    @abstractmethod
    def _content(self, completion: WholeCompletion) -> dict[str, Any]:
        """The choice's text and log probabilities."""


class ChatShape(ResponseShape):
    """/v1/chat/completions."""

    _whole_object = "chat.completion"
    _chunk_object = "chat.completion.chunk"

    def opening_frame(self) -> bytes:
        return self._frame('{"role": "assistant", "content": ""}', "null", "null")

    def text_frame(self, text: str, logprobs: Sequence[PositionLogprobs]) -> bytes:
        rendered = json.dumps(self._logprobs(logprobs), ensure_ascii=False) if logprobs else "null"
        return self._frame('{"content": ' + encode_basestring(text) + "}", rendered, "null")

    def closing_frame(self, reason: str) -> bytes:
        return self._frame("{}", "null", f'"{reason}"')

    def _frame(self, delta: str, logprobs: str, reason: str) -> bytes:
        middle = f'"delta": {delta}, "logprobs": {logprobs}, "finish_reason": {reason}'
        return (self._prefix + middle + self._suffix).encode()

    def _content(self, completion: WholeCompletion) -> dict[str, Any]:
        logprobs = self._logprobs(completion.logprobs) if completion.logprobs else None
        return {"message": {"role": "assistant", "content": completion.text}, "logprobs": logprobs}

    def _logprobs(self, positions: Sequence[PositionLogprobs]) -> dict[str, Any]:
        content = []
        for position in positions:
            entry = self._token(position.token_id, position.logprob)
            entry["top_logprobs"] = [self._token(*candidate) for candidate in position.top]
            content.append(entry)
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._tokenizer.token_text(token_id),
            "logprob": logprob,
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }


class TextShape(ResponseShape):
    """/v1/completions."""

    _whole_object = "text_completion"
    _chunk_object = "text_completion"

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._text_offset = 0

    def text_frame(self, text: str, logprobs: Sequence[PositionLogprobs]) -> bytes:
        rendered = json.dumps(self._logprobs(logprobs), ensure_ascii=False) if logprobs else "null"
        return self._frame(encode_basestring(text), rendered, "null")

    def closing_frame(self, reason: str) -> bytes:
        return self._frame('""', "null", f'"{reason}"')

    def _frame(self, text: str, logprobs: str, reason: str) -> bytes:
        middle = f'"text": {text}, "logprobs": {logprobs}, "finish_reason": {reason}'
        return (self._prefix + middle + self._suffix).encode()

    def _content(self, completion: WholeCompletion) -> dict[str, Any]:
        logprobs = self._logprobs(completion.logprobs) if completion.logprobs else None
        return {"text": completion.text, "logprobs": logprobs}

    def _logprobs(self, positions: Sequence[PositionLogprobs]) -> dict[str, Any]:
        """Columns; `text_offset` counts the characters of the tokens' own texts before each."""
        text_of = self._tokenizer.token_text
        columns: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for position in positions:
            text = text_of(position.token_id)
            columns["tokens"].append(text)
            columns["token_logprobs"].append(position.logprob)
            columns["top_logprobs"].append({text_of(token_id): value for token_id, value in position.top})
            columns["text_offset"].append(self._text_offset)
            self._text_offset += len(text)
        return columns
