"""Data sets to infer over: ms-swift's lines of queries and OpenAI's of messages, and the results of both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pagewire.base.errors import ConfigError, InvalidRequest
from pagewire.batch.lines import Line
from pagewire.wire.query_history import to_messages

OPENING = b'{"response": '
"""What every result begins with."""

_FORMS = (
    'it must have "query" (and may have "history", "system" and "response"), or "messages"; '
    'for --metric ppl also "text" will do'
)


@dataclass(frozen=True, slots=True)
class Sample:
    """A line of a data set.

    Attributes:
        line: where it is.
        messages: the turns to answer.
        labels: the answer that the data set has; None if it has none.
        text: a text to score, instead of turns and an answer.
        shown: what its result says of it, besides the answers.
        error: why it cannot be asked, if it cannot.
    """

    line: Line
    messages: list[dict[str, Any]] = field(default_factory=list)
    labels: str | None = None
    text: str | None = None
    shown: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def result(self, response: str | None, **more: Any) -> bytes:
        """The line of results that has this response."""
        fields = {"response": response, "labels": self.labels, **self.shown, **more}
        if "messages" in fields and response is not None:
            fields["messages"] = [*self.messages, {"role": "assistant", "content": response}]
        return json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace")

    def has_result(self, result: Mapping[str, Any]) -> bool:
        """Whether a result is this line's."""
        expected = json.loads(self.result(result.get("response")))
        return all(result.get(name) == value for name, value in expected.items())


def read_sample(line: Line, system: str | None) -> Sample:
    """A line, or what is wrong with it.

    Args:
        system: what the model is told first, where the line does not say.
    """
    try:
        fields = line.fields()
        if "messages" in fields:
            return _of_messages(line, fields, system)
        if "query" in fields:
            return _of_query(line, fields, system)
        if isinstance(fields.get("text"), str):
            return Sample(line, text=fields["text"], shown={"text": fields["text"]})
        raise InvalidRequest(f"line {line.number} is no request: {_FORMS}")
    except InvalidRequest as error:
        return Sample(line, error=error.message)


def read_result(content: bytes, number: int) -> dict[str, Any]:
    """A line of results.

    Raises:
        ConfigError: it is none.
    """
    try:
        return Line(number, content).fields()
    except InvalidRequest as error:
        raise ConfigError(f"the results are damaged: {error.message}") from None


def _of_query(line: Line, fields: dict[str, Any], system: str | None) -> Sample:
    request = {**fields, "system": fields.get("system", system)}
    messages = to_messages(request, f"line {line.number}")
    shown = {"history": fields.get("history") or [], "query": fields["query"], "system": request["system"]}
    labels = next((fields[name] for name in ("response", "labels", "label") if name in fields), None)
    return Sample(line, messages, _text(line, labels, "response"), shown=shown)


def _of_messages(line: Line, fields: dict[str, Any], system: str | None) -> Sample:
    messages = fields["messages"]
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise InvalidRequest(
            f'line {line.number}: messages is no list of {{"role": ..., "content": ...}} objects'
        )
    labels = fields.get("labels")
    if messages and messages[-1].get("role") == "assistant":
        labels = messages[-1].get("content")
        messages = messages[:-1]
    if not messages:
        raise InvalidRequest(f"line {line.number}: messages has no turn to answer")
    if system is not None and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Sample(line, messages, _text(line, labels, "the last turn"), shown={"messages": messages})


def _text(line: Line, value: Any, name: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise InvalidRequest(f"line {line.number}: {name} is {value!r}; it must be a text")
