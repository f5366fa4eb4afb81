"""/v1/responses: the answer's shape, built event by event, so that streamed and whole answers are equal."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from frontend.generation.events import Delta, Finished, FinishReason, PositionLogprobs
from frontend.generation.message_parser import ToolCallDelta
from frontend.http.openai.schemas.responses import ResponsesBody
from frontend.text.tokenizer import TextTokenizer
from pagewire.base.errors import PagewireError
from pagewire.wire.sampling_params import SamplingParams

Event = dict[str, Any]


def event_frame(event: Event) -> bytes:
    """One server-sent event, its type told twice, as OpenAI's servers do."""
    return f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n".encode()


class ResponseBuilder:
    """One response in the making. Every method returns the events that a stream shows of what it did.

    Attributes:
        response: the response object, whole once `end` or `fail` was called.
        reasoning: what the model thought, so far.
    """

    def __init__(
        self,
        body: ResponsesBody,
        sampling: SamplingParams,
        *,
        request_id: str,
        model: str,
        tokenizer: TextTokenizer,
    ) -> None:
        self._request_id = request_id
        self._tokenizer = tokenizer
        self._sequence = 0
        self._item: _Item | None = None
        self._num_items = 0
        self._held: list[PositionLogprobs] = []
        self._wants_logprobs = sampling.logprobs is not None
        self.reasoning = ""
        self.response = _response(body, sampling, f"resp_{request_id}", model)

    def begin(self) -> list[Event]:
        """The first events."""
        return [
            self._event("response.created", response=dict(self.response)),
            self._event("response.in_progress", response=dict(self.response)),
        ]

    def add(self, delta: Delta) -> list[Event]:
        """More of the answer: thoughts, then text, then calls."""
        events: list[Event] = []
        self._held += delta.logprobs
        if delta.reasoning:
            self.reasoning += delta.reasoning
            events += self._switch("reasoning")
            events += self._grow(delta.reasoning, "response.reasoning_text.delta")
        if delta.text:
            events += self._switch("message")
            events += self._grow_text(delta.text)
        elif delta.reasoning or delta.tool_calls:
            self._held.clear()  # log probabilities are those of the text
        for call in delta.tool_calls:
            events += self._add_call(call)
        return events

    def end(self, finished: Finished, num_reasoning_tokens: int) -> list[Event]:
        """The end, as it came about."""
        reason = finished.reason
        complete = reason in (FinishReason.STOP, FinishReason.TOOL_CALLS)
        events: list[Event] = []
        if self._item is None and not self.response["output"]:
            events += self._switch("message")  # an answer without a word is a message too
        if self._held and self._item is not None and self._item.kind == "message":
            events += self._grow_text("")
        events += self._close("completed" if complete else "incomplete")
        usage = finished.usage
        self.response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": num_reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        if reason is FinishReason.ABORT:
            return events + self._fail("server_error", "this server is shutting down; send the request again")
        if complete:
            self.response["status"] = "completed"
            self.response["completed_at"] = int(time.time())
        else:
            self.response["status"] = "incomplete"
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        return [*events, self._event(f"response.{self.response['status']}", response=self.response)]

    def fail(self, error: PagewireError) -> list[Event]:
        """The end by an error, after something was sent already."""
        return self._close("incomplete") + self._fail("server_error", error.message)

    def _fail(self, code: str, message: str) -> list[Event]:
        self.response["status"] = "failed"
        self.response["error"] = {"code": code, "message": message}
        return [self._event("response.failed", response=self.response)]

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event

    def _placed(self, kind: str, item: _Item, **fields: Any) -> Event:
        """An event about an item, or about its one piece of content."""
        place: dict[str, Any] = {"item_id": item.id, "output_index": item.index}
        if item.kind != "function_call":
            place["content_index"] = 0
        return self._event(kind, **place, **fields)

    def _switch(self, kind: str) -> list[Event]:
        """Makes an item of this kind the one that grows."""
        if self._item is not None and self._item.kind == kind and kind != "function_call":
            return []
        events = self._close("completed")
        item = self._item = _Item(kind, self._num_items, self._request_id)
        self._num_items += 1
        events.append(
            self._event(
                "response.output_item.added", output_index=item.index, item=item.render("in_progress")
            )
        )
        if kind != "function_call":
            events.append(self._placed("response.content_part.added", item, part=item.part()))
        return events

    def _grow(self, text: str, kind: str, **fields: Any) -> list[Event]:
        assert self._item is not None
        self._item.text.append(text)
        return [self._placed(kind, self._item, delta=text, **fields)]

    def _grow_text(self, text: str) -> list[Event]:
        assert self._item is not None
        logprobs = [self._logprob(position) for position in self._held] if self._wants_logprobs else []
        self._held.clear()
        self._item.logprobs += logprobs
        return self._grow(text, "response.output_text.delta", logprobs=[_short(each) for each in logprobs])

    def _add_call(self, call: ToolCallDelta) -> list[Event]:
        events: list[Event] = []
        if call.name:
            events += self._switch_to_call(call)
        if call.arguments:
            events += self._grow(call.arguments, "response.function_call_arguments.delta")
        return events

    def _switch_to_call(self, call: ToolCallDelta) -> list[Event]:
        events = self._close("completed")
        item = self._item = _Item("function_call", self._num_items, self._request_id, call.id, call.name)
        self._num_items += 1
        added = self._event(
            "response.output_item.added", output_index=item.index, item=item.render("in_progress")
        )
        return [*events, added]

    def _close(self, status: str) -> list[Event]:
        """Ends the item that grows, if there is one."""
        item, self._item = self._item, None
        if item is None:
            return []
        rendered = item.render(status)
        self.response["output"].append(rendered)
        return [
            *self._done(item),
            self._event("response.output_item.done", output_index=item.index, item=rendered),
        ]

    def _done(self, item: _Item) -> Iterator[Event]:
        text = "".join(item.text)
        if item.kind == "function_call":
            kind = "response.function_call_arguments.done"
            yield self._placed(kind, item, name=item.name, arguments=text)
            return
        if item.kind == "reasoning":
            yield self._placed("response.reasoning_text.done", item, text=text)
        else:
            logprobs = [_short(each) for each in item.logprobs]
            yield self._placed("response.output_text.done", item, text=text, logprobs=logprobs)
        yield self._placed("response.content_part.done", item, part=item.part())

    def _logprob(self, position: PositionLogprobs) -> dict[str, Any]:
        top = [self._token(*candidate) for candidate in position.top]
        return {**self._token(position.token_id, position.logprob), "top_logprobs": top}

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._tokenizer.token_text(token_id),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
            "logprob": logprob,
        }


class _Item:
    """One item of the output: a message, a call, or thoughts."""

    def __init__(self, kind: str, index: int, request_id: str, call_id: str = "", name: str = "") -> None:
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        self.kind = kind
        self.index = index
        self.id = f"{prefix}_{request_id}_{index}"
        self.call_id = call_id
        self.name = name
        self.text: list[str] = []
        self.logprobs: list[dict[str, Any]] = []

    def part(self) -> dict[str, Any]:
        """Its piece of content, as far as there is some."""
        text = "".join(self.text)
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self.logprobs)}

    def render(self, status: str) -> dict[str, Any]:
        """The item; without content while it has yet to grow."""
        item: dict[str, Any] = {"id": self.id, "type": self.kind, "status": status}
        content = [self.part()] if status != "in_progress" else []
        if self.kind == "message":
            return {**item, "role": "assistant", "content": content}
        if self.kind == "reasoning":
            return {**item, "summary": [], "content": content, "encrypted_content": None}
        arguments = "".join(self.text)
        return {**item, "call_id": self.call_id, "name": self.name, "arguments": arguments}


def _short(logprob: dict[str, Any]) -> dict[str, Any]:
    """As stream events have it: without bytes."""
    top: Sequence[dict[str, Any]] = logprob["top_logprobs"]
    return {
        "token": logprob["token"],
        "logprob": logprob["logprob"],
        "top_logprobs": [{"token": each["token"], "logprob": each["logprob"]} for each in top],
    }


def _response(body: ResponsesBody, sampling: SamplingParams, response_id: str, model: str) -> dict[str, Any]:
    """A response that has only begun. It tells the request's settings as they were understood."""

    def told(value: Any) -> Any:
        return None if value is None else value.model_dump(mode="json", by_alias=True, exclude_unset=True)

    choice = body.tool_choice
    text = told(body.text) or {}
    form = text.get("format") or {"type": "text"}
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None, **(told(body.reasoning) or {})},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": sampling.temperature,
        "text": {"format": form, "verbosity": text.get("verbosity") or "medium"},
        "tool_choice": choice if isinstance(choice, str) else told(choice) or "auto",
        "tools": [{"strict": False, **told(tool)} for tool in body.tools or ()],
        "top_logprobs": sampling.logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": body.user,
    }
