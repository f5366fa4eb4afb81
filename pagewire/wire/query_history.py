"""Conversations as ms-swift writes them: a query, and the turns before it as pairs of query and response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from pagewire.base.errors import InvalidRequest


class QueryRequest(TypedDict):
    """A turn to answer.

    query: what the user says now. history: [query, response] of each turn before, oldest first. system: what
    the model is told first.
    """

    query: str
    history: NotRequired[Sequence[Sequence[str]] | None]
    system: NotRequired[str | None]


class QueryResponse(TypedDict):
    """An answer, and the history to send with the next query."""

    response: str
    history: list[list[str]]


def to_messages(request: QueryRequest | Mapping[str, Any], name: str = "request") -> list[dict[str, str]]:
    """The turns as OpenAI's API writes them.

    Args:
        request: keys besides those of `QueryRequest` are not looked at.
        name: what errors call it.

    Raises:
        InvalidRequest: it has no query, or something is of another kind.
    """
    query, system = request.get("query"), request.get("system")
    if not isinstance(query, str):
        raise InvalidRequest(
            f'{name} has no query; it must be {{"query": text, "history": [[query, response], ...], '
            '"system": text}, the last two of which may be left out',
            param="query",
        )
    messages = []
    if system is not None and system != "":
        if not isinstance(system, str):
            raise InvalidRequest(f"{name}: system is {system!r}; it must be a text", param="system")
        messages.append({"role": "system", "content": system})
    for asked, answered in _pairs(request, name):
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answered})
    return [*messages, {"role": "user", "content": query}]


def to_answer(request: QueryRequest | Mapping[str, Any], response: str) -> QueryResponse:
    """The answer to a request that `to_messages` took."""
    history = [[*pair] for pair in request.get("history") or ()]
    return {"response": response, "history": [*history, [request["query"], response]]}


def _pairs(request: QueryRequest | Mapping[str, Any], name: str) -> list[Sequence[str]]:
    history = request.get("history")
    pairs = [] if history is None else history
    is_list = isinstance(pairs, Sequence) and not isinstance(pairs, str)
    if not is_list or not all(map(_is_pair, pairs)):
        raise InvalidRequest(
            f"{name}: history is not a list of [query, response] pairs of texts", param="history"
        )
    return list(pairs)


def _is_pair(pair: Any) -> bool:
    return (
        isinstance(pair, Sequence)
        and not isinstance(pair, str)
        and len(pair) == 2
        and all(isinstance(text, str) for text in pair)
    )
