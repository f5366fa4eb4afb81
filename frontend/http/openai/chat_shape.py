"""/v1/chat/completions: the answer's shape."""

from __future__ import annotations

import json
from collections.abc import Sequence
from json.encoder import encode_basestring
from typing import Any

from frontend.generation.answer import WholeChoice
from frontend.generation.events import Delta, Finished, PositionLogprobs, PromptRead
from frontend.generation.message_parser import ToolCallDelta
from frontend.http.openai.shapes import ResponseShape


class ChatShape(ResponseShape):
    """A message for each choice. The prompt is told of beside the choices, as a chat has only one."""

    _whole_object = "chat.completion"
    _chunk_object = "chat.completion.chunk"

    def _opening(self, index: int, prompt: PromptRead | None) -> str:
        facts = self._prompt_facts(prompt) if index == 0 else {}
        around = f", {json.dumps(facts, ensure_ascii=False)[1:-1]}" if facts else ""
        return self._chunk(index, '{"role": "assistant", "content": ""}', "null", "null", around=around)

    def _said(self, delta: Delta, token_ids: Sequence[int], logprobs: Sequence[PositionLogprobs]) -> str:
        if delta.reasoning or delta.tool_calls:
            said = json.dumps(_parts(delta), ensure_ascii=False)
        else:
            said = '{"content": ' + encode_basestring(delta.text) + "}"
        rendered = json.dumps(self._logprobs(logprobs), ensure_ascii=False) if logprobs else "null"
        return self._chunk(delta.index, said, rendered, "null", self._rendered_ids(token_ids))

    def _ending(self, finished: Finished) -> str:
        return self._chunk(finished.index, "{}", "null", self._reasons(finished))

    def _chunk(
        self, index: int, delta: str, logprobs: str, reason: str, ids: str = "", *, around: str = ""
    ) -> str:
        choice = f'"delta": {delta}, "logprobs": {logprobs}, "finish_reason": {reason}{ids}'
        return self._frame(index, choice, around)

    def _content(self, choice: WholeChoice, prompt: PromptRead | None) -> dict[str, Any]:
        logprobs = self._logprobs(choice.logprobs) if choice.logprobs else None
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        if choice.reasoning:
            message |= _reasoning(choice.reasoning)
        if choice.tool_calls:
            message["content"] = choice.text or None
            message["tool_calls"] = [_whole_call(call) for call in choice.tool_calls]
        return {"message": message, "logprobs": logprobs}

    def _prompt_facts(self, prompt: PromptRead | None) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        if prompt is not None and self._options.return_token_ids:
            facts["prompt_token_ids"] = list(prompt.token_ids)
        if prompt is not None and self._options.prompt_logprobs is not None:
            facts["prompt_logprobs"] = self._prompt_logprobs(prompt)
        return facts

    def _logprobs(self, positions: Sequence[PositionLogprobs]) -> dict[str, Any]:
        content = []
        for position in positions:
            entry = self._token(position.token_id, position.logprob)
            entry["top_logprobs"] = [self._token(*candidate) for candidate in position.top]
            content.append(entry)
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._tokenizer.token_text(token_id),
            "logprob": logprob,
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }


def _parts(delta: Delta) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    if delta.reasoning:
        parts |= _reasoning(delta.reasoning)
    if delta.text:
        parts["content"] = delta.text
    if delta.tool_calls:
        parts["tool_calls"] = [_call_delta(call) for call in delta.tool_calls]
    return parts


def _reasoning(text: str) -> dict[str, str]:
    """Under both of the names that clients know."""
    return {"reasoning_content": text, "reasoning": text}


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    """The id, the type and the name come once, with a call's first delta."""
    if not call.name:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index, **_whole_call(call)}


def _whole_call(call: ToolCallDelta) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}
