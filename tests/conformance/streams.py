"""A streamed answer put together again, to be compared with the same answer sent whole."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

_LISTS = ("token_ids", "prompt_token_ids", "prompt_logprobs")


def from_whole(answer: Any) -> dict[str, Any]:
    """What an answer says, without what no two answers share: ids and times."""
    told = answer.model_dump()
    for choice in told["choices"]:
        for call in (choice.get("message") or {}).get("tool_calls") or ():
            del call["id"]
    choices = {choice.pop("index"): _said(choice) for choice in told["choices"]}
    return {"choices": choices, "usage": told["usage"]}


def from_chunks(chunks: list[Any]) -> dict[str, Any]:
    """The same of a stream's events."""
    *events, last = [chunk.model_dump() for chunk in chunks]
    assert len({event["id"] for event in [*events, last]}) == 1
    assert last["choices"] == []
    parts: dict[int, list[Any]] = defaultdict(list)
    for event in events:
        for part in event["choices"]:
            parts[part.pop("index")].append(part)
    return {"choices": {index: _joined(each) for index, each in parts.items()}, "usage": last["usage"]}


def _said(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice.get("message") or {}
    logprobs = choice["logprobs"] or {}
    return {
        "text": choice.get("text", message.get("content")) or "",
        "calls": [call["function"] for call in message.get("tool_calls") or ()],
        "logprobs": logprobs.get("content", logprobs),
        "finish_reason": choice["finish_reason"],
        **{name: choice[name] for name in _LISTS if choice.get(name)},
    }


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    assert [part["finish_reason"] is None for part in parts] == [True] * (len(parts) - 1) + [False]
    deltas = [part.get("delta") or {} for part in parts]
    calls: dict[int, dict[str, str]] = {}
    for delta in deltas:
        for call in delta.get("tool_calls") or ():
            function = calls.setdefault(call["index"], {"arguments": "", "name": ""})
            for name in function:
                function[name] += call["function"].get(name) or ""
    text = [part.get("text", delta.get("content")) or "" for part, delta in zip(parts, deltas, strict=True)]
    lists = {name: [one for part in parts for one in part.get(name) or ()] for name in _LISTS}
    return {
        "text": "".join(text),
        "calls": [calls[index] for index in sorted(calls)],
        "logprobs": _joined_logprobs([part["logprobs"] for part in parts if part["logprobs"]]),
        "finish_reason": parts[-1]["finish_reason"],
        **{name: items for name, items in lists.items() if items},
    }


def _joined_logprobs(parts: list[dict[str, Any]]) -> Any:
    if parts and "content" in parts[0]:
        return [position for part in parts for position in part["content"]]
    names = parts[0] if parts else ()
    return {name: [one for part in parts for one in part[name]] for name in names}
