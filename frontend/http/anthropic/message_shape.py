"""The answer to POST /v1/messages, whole and as server-sent events.

A stream's deltas differ only in their text: what is around it is rendered once for each block, so that a
frame of text costs one JSON escape and one concatenation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from json.encoder import encode_basestring
from typing import Any

from pydantic_core import from_json

from frontend.generation.answer import Answer
from frontend.generation.events import Delta, Event, Finished, FinishReason, Usage
from frontend.generation.message_parser import ToolCallDelta
from pagewire.base.errors import Unavailable

SIGNATURE = "unsigned"
"""Of thoughts, which some clients send back only with a signature. Nothing is signed, and none is checked."""

INVALID_JSON = "INVALID_JSON"
"""Key of a call's input that the model wrote so badly that it is no object: its text is the value."""

_PING = 'event: ping\ndata: {"type": "ping"}\n\n'
_AROUND_TEXT = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking")}


class MessageShape:
    """How one message looks. One instance a request."""

    def __init__(self, *, message_id: str, model: str, max_tokens: int) -> None:
        """Args:
        max_tokens: what the request allowed; the context may have had room for less.
        """
        self._base = {"id": message_id, "type": "message", "role": "assistant", "model": model}
        self._max_tokens = max_tokens
        self._begun = False
        self._num_blocks = 0
        self._open_kind = ""
        self._before_text = ""

    async def whole(self, answer: Answer) -> dict[str, Any]:
        """The answer to a request without streaming, its blocks in the order in which a stream has them.

        Raises:
            PagewireError: the request failed, or the server is shutting down.
        """
        content = _Content()
        stop: dict[str, Any] = {}
        async with aclosing(answer.rounds()) as rounds:
            async for events in rounds:
                for event in events:
                    if isinstance(event, Delta):
                        content.add(event)
                    elif isinstance(event, Finished):
                        stop = self._stop(event)
        return {**self._base, "content": content.blocks(), **stop, "usage": usage_object(answer.usage)}

    def frames(self, events: Sequence[Event], answer: Answer) -> bytes:
        """Server-sent events for what came together.

        Raises:
            Unavailable: the server is shutting down.
        """
        if len(events) == 1:
            frame = self._text_frame(events[0])
            if frame is not None:
                return frame.encode()
        frames = [] if self._begun else [self._begin(answer.usage)]
        for event in events:
            if isinstance(event, Delta):
                frames += self._delta(event)
            elif isinstance(event, Finished):
                frames += self._end(event, answer.usage)
        return "".join(frames).encode()

    def _text_frame(self, event: Event) -> str | None:
        """The frame of a delta that has only more text of the block that is open, as nearly all have."""
        if self._open_kind != "text" or not isinstance(event, Delta):
            return None
        if not event.text or event.reasoning or event.tool_calls:
            return None
        return f"{self._before_text}{encode_basestring(event.text)}}}}}\n\n"

    def _begin(self, usage: Usage) -> str:
        self._begun = True
        message: dict[str, Any] = {
            **self._base,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage_object(usage),
        }
        return _frame({"type": "message_start", "message": message})

    def _delta(self, delta: Delta) -> Iterator[str]:
        for kind, text, call in _parts_of(delta):
            if call is not None:
                yield from self._open(kind, _tool_use(call, {}))
            if kind != "tool_use":
                yield from self._more_text(kind, text)
            elif text:
                yield self._block_delta({"type": "input_json_delta", "partial_json": text})

    def _more_text(self, kind: str, text: str) -> Iterator[str]:
        if self._open_kind != kind:
            signature = {"signature": ""} if kind == "thinking" else {}
            yield from self._open(kind, {"type": kind, kind: "", **signature})
        yield f"{self._before_text}{encode_basestring(text)}}}}}\n\n"

    def _open(self, kind: str, block: dict[str, Any]) -> Iterator[str]:
        """Ends the block that is open, and begins another."""
        yield from self._close()
        index = self._num_blocks
        self._open_kind = kind
        self._num_blocks += 1
        if kind in _AROUND_TEXT:
            delta, field = _AROUND_TEXT[kind]
            self._before_text = (
                'event: content_block_delta\ndata: {"type": "content_block_delta", '
                f'"index": {index}, "delta": {{"type": "{delta}", "{field}": '
            )
        yield _frame({"type": "content_block_start", "index": index, "content_block": block})
        if index == 0:
            yield _PING

    def _close(self) -> Iterator[str]:
        if not self._open_kind:
            return
        if self._open_kind == "thinking":
            yield self._block_delta({"type": "signature_delta", "signature": SIGNATURE})
        yield _frame({"type": "content_block_stop", "index": self._num_blocks - 1})
        self._open_kind = ""

    def _end(self, finished: Finished, usage: Usage) -> Iterator[str]:
        if not self._num_blocks:
            yield from self._open("text", {"type": "text", "text": ""})
        yield from self._close()
        stop = self._stop(finished)
        yield _frame({"type": "message_delta", "delta": stop, "usage": usage_object(usage)})
        yield _frame({"type": "message_stop"})

    def _block_delta(self, delta: dict[str, Any]) -> str:
        return _frame({"type": "content_block_delta", "index": self._num_blocks - 1, "delta": delta})

    def _stop(self, finished: Finished) -> dict[str, Any]:
        reason = finished.reason
        if reason is FinishReason.ABORT:
            raise Unavailable("this server is shutting down; send the request again")
        if reason is FinishReason.TOOL_CALLS:
            told = "tool_use"
        elif reason is FinishReason.LENGTH:
            in_full = finished.usage.completion_tokens >= self._max_tokens
            told = "max_tokens" if in_full else "model_context_window_exceeded"
        else:
            told = "end_turn" if finished.stop_string is None else "stop_sequence"
        return {"stop_reason": told, "stop_sequence": finished.stop_string}


class _Content:
    """The blocks of a whole message, as they come."""

    def __init__(self) -> None:
        self._blocks: list[tuple[str, list[str], ToolCallDelta | None]] = []

    def add(self, delta: Delta) -> None:
        for kind, text, call in _parts_of(delta):
            if call is not None or not self._blocks or self._blocks[-1][0] != kind:
                self._blocks.append((kind, [], call))
            self._blocks[-1][1].append(text)

    def blocks(self) -> list[dict[str, Any]]:
        """An answer without a word has a block of text, too."""
        rendered: list[dict[str, Any]] = []
        for kind, pieces, call in self._blocks:
            text = "".join(pieces)
            if call is not None:
                rendered.append(_tool_use(call, _input_of(text)))
            elif kind == "thinking":
                rendered.append({"type": "thinking", "thinking": text, "signature": SIGNATURE})
            else:
                rendered.append({"type": "text", "text": text})
        return rendered or [{"type": "text", "text": ""}]


def _parts_of(delta: Delta) -> Iterator[tuple[str, str, ToolCallDelta | None]]:
    """What a delta says, in order: the kind of block, more for it and, where a call begins, the call. More of
    a call that has begun comes first: text that came with it stood behind it."""
    calls = list(delta.tool_calls)
    if calls and not calls[0].name:
        yield "tool_use", calls.pop(0).arguments, None
    if delta.reasoning:
        yield "thinking", delta.reasoning, None
    if delta.text:
        yield "text", delta.text, None
    for call in calls:
        yield "tool_use", call.arguments, call


def usage_object(usage: Usage) -> dict[str, Any]:
    """Anthropic's counts: those of the input are of what was computed and of what came from the cache."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def event_frame(event: dict[str, Any]) -> bytes:
    """One server-sent event, its type told twice, as Anthropic's servers do."""
    return _frame(event).encode()


def _frame(event: dict[str, Any]) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"


def _tool_use(call: ToolCallDelta, given: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": given}


def _input_of(arguments: str) -> dict[str, Any]:
    """A call's arguments as an object: what there is of it, if the answer was cut off within."""
    try:
        given = from_json(arguments or "{}", allow_partial="trailing-strings", allow_inf_nan=False)
    except ValueError:
        given = None
    return given if isinstance(given, dict) else {INVALID_JSON: arguments}
