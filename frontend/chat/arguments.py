"""Arguments of calls in a conversation's history, which need not be what the tool could take.

An answer that was cut off at max_tokens has half of its arguments, and other servers' models write anything.
A conversation that has such a call can go on all the same, so that nothing of it is refused.
"""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 64
"""Arguments nested deeper stay text: templates recurse over objects."""

Arguments = dict[str, Any] | str
"""An object or, where they are none, the text that they came as."""


def read_arguments(given: Any) -> Arguments:
    """The arguments of an earlier call, as `Conversation` has them.

    Args:
        given: a JSON text or, as some clients send it, any JSON value. None, null and an empty text are no
            arguments, that is an empty object.
    """
    if not isinstance(given, str):
        given = json.dumps(given, ensure_ascii=False)
    value = _parsed(given)
    if value is None:
        return {}
    return value if isinstance(value, dict) and not _deeper(value, MAX_DEPTH) else given


def as_object(arguments: Arguments) -> dict[str, Any]:
    """For templates that go through arguments: what is no object is the value of a key "arguments" in one."""
    if isinstance(arguments, dict):
        return arguments
    value = _parsed(arguments)
    return {"arguments": arguments if _deeper(value, MAX_DEPTH) else value}


def as_text(arguments: Arguments) -> str:
    """For templates that write arguments as they are."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _parsed(text: str) -> Any:
    """The value of a JSON text, None if it is empty; the text itself if it is no JSON."""
    if not text.strip():
        return None
    try:
        value = json.loads(text)
        return _whole_characters(value) if "\\u" in text else value
    except (ValueError, RecursionError):
        return text


def _whole_characters(value: Any) -> Any:
    """With a replacement character for each half of a surrogate pair, which no prompt can have."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return value


def _deeper(value: Any, limit: int) -> bool:
    """Whether objects and lists are nested more than `limit` times."""
    level = [value]
    for _ in range(limit):
        level = [child for each in level for child in _children(each)]
        if not level:
            return False
    return True


def _children(value: Any) -> list[Any]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [each for each in values if isinstance(each, dict | list)]
