"""Reads the events of OpenAI's streams: which of them are output, what was counted, and what went wrong."""

from __future__ import annotations

import json
from typing import Any

from pagewire.bench.serve.answer import Answer

_OPEN, _OPEN_SPACED = b'"finish_reason":null', b'"finish_reason": null'
_SAID = (b'"content":"', b'"content": "')
_SAID_NOTHING = (b'"content":""', b'"content": ""')
MAX_MESSAGE = 200


class EventReader:
    """Fills an answer from the events of its stream.

    Most events are a token and nothing else. They are known by bytes that cannot be part of a string in JSON,
    where quotes are escaped; every other event is decoded.
    """

    __slots__ = ("_answer", "_chat", "is_done")

    def __init__(self, answer: Answer, *, chat: bool) -> None:
        self._answer = answer
        self._chat = chat
        self.is_done = False

    def read(self, events: list[bytes], now: float) -> None:
        """Takes events that arrived at `now`."""
        times = self._answer.times
        for event in events:
            if (_OPEN_SPACED in event or _OPEN in event) and (not self._chat or _has_content(event)):
                times.append(now)
            else:
                self._decode(event, now)

    def _decode(self, event: bytes, now: float) -> None:
        if event == b"[DONE]":
            self.is_done = True
            return
        try:
            said = json.loads(event)
            if said.get("error"):
                self._answer.fail(f"stream error: {message_of(event)}", now)
                return
            for choice in said.get("choices") or ():
                self._choice(choice, now)
            if said.get("usage"):
                self._usage(said["usage"])
        except (ValueError, AttributeError, TypeError) as error:
            self._answer.fail(f"unreadable event: {type(error).__name__}: {_short(event)}", now)

    def _choice(self, choice: dict[str, Any], now: float) -> None:
        reason = choice.get("finish_reason")
        if self._chat:
            delta = choice.get("delta") or {}
            parts = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")
            is_output = any(delta.get(part) for part in parts)
        else:
            # A token may have no text of its own, as half a character; the closing event has no token.
            is_output = bool(choice.get("text")) or not reason
        if is_output:
            self._answer.times.append(now)
        if reason:
            self._answer.finish_reason = str(reason)
            self._answer.ended = now

    def _usage(self, usage: dict[str, Any]) -> None:
        answer = self._answer
        answer.prompt_tokens = _count(usage.get("prompt_tokens"))
        answer.output_tokens = _count(usage.get("completion_tokens"))
        answer.cached_tokens = _count((usage.get("prompt_tokens_details") or {}).get("cached_tokens"))

    def end(self, now: float) -> None:
        """The stream is over."""
        answer = self._answer
        if not answer.error and not answer.finish_reason and not self.is_done:
            answer.fail("the stream ended without a finish_reason", now)
        elif answer.ended != answer.ended:  # NaN: [DONE] came without a finish_reason
            answer.ended = answer.times[-1] if answer.times else now


def message_of(body: bytes) -> str:
    """What an error's body says: OpenAI's error object or FastAPI's detail, else its beginning."""
    try:
        said = json.loads(body)
        error = said.get("error", said)
        if isinstance(error, dict):
            error = error.get("message") or error.get("detail")
        if error:
            return _short(str(error).encode())
    except (ValueError, AttributeError):
        return _short(body)
    return _short(body)


def _has_content(event: bytes) -> bool:
    if _SAID_NOTHING[0] in event or _SAID_NOTHING[1] in event:
        return False
    return _SAID[0] in event or _SAID[1] in event


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _short(data: bytes) -> str:
    text = " ".join(data.decode("utf-8", "replace").split())
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]} ..."
