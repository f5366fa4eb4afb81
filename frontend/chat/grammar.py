"""Grammars for replies that are only partly constrained, in llguidance's Lark syntax."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from frontend.chat.reasoning import ReasoningFormat, Thoughts
from pagewire.base.errors import InvalidRequest
from pagewire.structured.translate import with_exclusive_bounds
from pagewire.wire.sampling_params import StructuredOutput

# As in constraints that are a schema alone: a bound, or a model that likes white space writes nothing else.
_JSON_OPTIONS = {"whitespace_pattern": r" |\n{1,2}[ \t]{0,20}", "lenient": False}

ANY_TEXT = "/(?s:.*)/"
COMMON_RULES = f"""\
TEXT: {ANY_TEXT}
SPACE: /\\s{{1,4}}/
"""
"""Terminals that every grammar here may use."""


class Marks:
    """How a grammar refers to the marks of a format: a special token by its id, anything else by its text.

    A special token is never part of a grammar's text.
    """

    def __init__(self, special_ids: Mapping[str, int]) -> None:
        self._special_ids = special_ids

    def mark(self, text: str) -> str:
        """The mark itself."""
        token_id = self._special_ids.get(text)
        return literal(text) if token_id is None else f"<[{token_id}]>"

    def up_to(self, rule: str, text: str) -> str:
        """A rule for any text up to the first mark, the mark included."""
        if text in self._special_ids:
            return f"{rule}: TEXT? {self.mark(text)}"
        return f"{rule}[lazy]: /(?s:.*){_in_regex(text)}/"


def literal(text: str) -> str:
    """Exactly this text."""
    return json.dumps(text, ensure_ascii=False)


def json_value(schema: Mapping[str, Any] | bool) -> str:
    """JSON of a schema."""
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    mended = with_exclusive_bounds(schema)
    return "%json " + json.dumps({**mended, "x-guidance": _JSON_OPTIONS}, ensure_ascii=False)


def constrained(structured: StructuredOutput) -> str:
    """The right side of a rule for a constraint.

    Raises:
        InvalidRequest: it is a grammar, which cannot be part of another.
    """
    if structured.json_object:
        return json_value({"type": "object"})
    if structured.json_schema is not None:
        try:
            schema = json.loads(structured.json_schema)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"the JSON schema is no JSON: {error}", param="structured_output") from error
        if not isinstance(schema, dict | bool):
            raise InvalidRequest(
                "the JSON schema must be an object, true or false", param="structured_output"
            )
        return json_value(schema)
    if structured.choices:
        return " | ".join(map(literal, structured.choices))
    if structured.regex is not None:
        return f"/{_slashes_escaped(structured.regex)}/"
    raise InvalidRequest(
        "a grammar cannot be combined with thoughts before the answer, nor with tools; turn thinking off, if "
        'the model has a switch such as chat_template_kwargs {"enable_thinking": false}, or use a JSON '
        "schema, a regular expression or choices",
        param="structured_output",
    )


def behind_thoughts(reply: str, rules: str, form: ReasoningFormat, marks: Marks, thoughts: Thoughts) -> str:
    """A whole grammar: thoughts, in which everything goes, and then the reply.

    Args:
        reply: the right side of the reply's rule.
        rules: further rules that it uses.
        thoughts: whether they have begun in the prompt; otherwise they may be missing.
    """
    begin = "thoughts SPACE? reply"
    start = begin if thoughts is Thoughts.OPEN else f"reply | SPACE? {marks.mark(form.opening)} {begin}"
    rule = marks.up_to("thoughts", form.closing)
    return f"%llguidance {{}}\nstart: {start}\n{rule}\nreply: {reply}\n{rules}{COMMON_RULES}"


def without_thoughts(reply: str, rules: str) -> str:
    """A whole grammar of the reply alone."""
    return f"%llguidance {{}}\nstart: reply\nreply: {reply}\n{rules}{COMMON_RULES}"


def _in_regex(text: str) -> str:
    return _slashes_escaped(re.sub(r"[\\.+*?()|\[\]{}^$]", r"\\\g<0>", text))


def _slashes_escaped(regex: str) -> str:
    """A regular expression as it stands between slashes."""
    return re.sub(r"(\\.)|/", lambda match: match[1] or r"\/", regex, flags=re.DOTALL)
