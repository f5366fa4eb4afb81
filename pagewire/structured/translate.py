"""A constraint in the form that llguidance compiles, and its complaints in words that name the fault."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

from llguidance import LLMatcher, LLParserLimits
from llguidance.gbnf_to_lark import gbnf_to_lark

from pagewire.base.errors import InvalidRequest
from pagewire.structured.schema_walk import rebuilt
from pagewire.wire.sampling_params import StructuredOutput

if TYPE_CHECKING:  # it exists in the stubs only
    from llguidance._lib import JsonCompileOptions

# Between JSON's parts: nothing, a space, or a line break and an indent. Without a bound, a model that likes
# white space never needs to say anything else.
_JSON_SPACE = r" |\n{1,2}[ \t]{0,20}"
_JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": _JSON_SPACE, "lenient": False}
_GBNF_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
_GBNF_CODE_POINT = re.compile(r"(?<!\\)((?:\\\\)*)\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))")
_REGEX_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$]")
_SOURCE_EXCERPT = re.compile(r"\n\s*\d+ \|.*", re.DOTALL)
_MAX_COMPLAINT = 500


def parser_limits() -> LLParserLimits:
    """What one matcher may take: some 15 ms a step in the worst case, and some 100 MB of lexer states."""
    return LLParserLimits(max_lexer_states=50_000, max_grammar_size=200_000, verbose_errors=False)


def to_grammar(structured: StructuredOutput) -> str:
    """The constraint as llguidance takes it, checked as far as that needs no vocabulary.

    Deep or vast constraints may take very long or crash the process: see `checker`.

    Raises:
        InvalidRequest: it is wrong or not supported; the message names the keyword or the place.
    """
    try:
        grammar = _grammar(structured)
    except RecursionError:
        raise _wrong(structured, "it is nested too deeply") from None
    except UnicodeEncodeError:
        raise _wrong(structured, "it has half a surrogate pair; it must be valid Unicode") from None
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=parser_limits())
    if is_error:
        raise _wrong(structured, messages[0])
    return grammar


def _grammar(structured: StructuredOutput) -> str:
    if structured.json_object:
        return LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=_JSON_OPTIONS)
    if structured.json_schema is not None:
        return _json_schema(structured)
    if structured.choices:
        texts = (_REGEX_SPECIAL.sub(r"\\\g<0>", text) for text in structured.choices)
        return LLMatcher.grammar_from_regex("|".join(f"({text})" for text in texts))
    if structured.regex is not None:
        return LLMatcher.grammar_from_regex(structured.regex)
    assert structured.grammar is not None
    return LLMatcher.grammar_from_lark(_lark(structured, structured.grammar))


def _json_schema(structured: StructuredOutput) -> str:
    assert structured.json_schema is not None
    try:
        schema = json.loads(structured.json_schema)
    except ValueError as error:
        raise _wrong(structured, f"it is not JSON: {error}") from None
    if not isinstance(schema, dict | bool):
        raise _wrong(structured, "it must be an object, true or false")
    # llguidance's options go into the schema, which has to be an object for that.
    text = {True: "{}", False: '{"enum": []}'}[schema] if isinstance(schema, bool) else structured.json_schema
    if (mended := with_exclusive_bounds(schema)) != schema:
        text = json.dumps(mended, ensure_ascii=False)
    try:
        return LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)
    except ValueError as error:
        raise _wrong(structured, str(error)) from None


def with_exclusive_bounds(schema: Any) -> Any:
    """A schema of which llguidance keeps the exclusive bounds of numbers, draft 4's included.

    It lets a whole number that is an exclusive bound through where the other bound is less than 1 away
    (seen in 1.9.1). There the next number of nine decimals becomes an inclusive bound, so that what is
    allowed is valid.

    Raises:
        RecursionError: it is nested too deeply.
    """
    return rebuilt(schema, _with_exclusive_bounds)


def _with_exclusive_bounds(schema: dict[str, Any]) -> dict[str, Any]:
    for inclusive, exclusive, _, _ in _BOUNDS:  # draft 4 has true or false beside the bound
        is_exclusive, bound = schema.get(exclusive), schema.get(inclusive)
        if isinstance(is_exclusive, bool):
            del schema[exclusive]
            if is_exclusive and _is_number(bound):
                del schema[inclusive]
                schema[exclusive] = bound
    given = dict(schema)
    for inclusive, exclusive, others, sign in _BOUNDS:
        bound = given.get(exclusive)
        near = [given[name] for name in others if _is_number(given.get(name))]
        if _is_number(bound) and bound == int(bound) and any(0 < sign * (each - bound) < 1 for each in near):
            del schema[exclusive]
            nearest = bound + sign * max(1e-9, math.ulp(bound))
            beside = given.get(inclusive)
            schema[inclusive] = (max, min)[sign < 0](nearest, beside) if _is_number(beside) else nearest
    return schema


_BOUNDS = (
    ("minimum", "exclusiveMinimum", ("maximum", "exclusiveMaximum"), 1),
    ("maximum", "exclusiveMaximum", ("minimum", "exclusiveMinimum"), -1),
)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _lark(structured: StructuredOutput, grammar: str) -> str:
    """GBNF is recognized by its `::=`."""
    if not _GBNF_RULE.search(grammar):
        return grammar
    try:
        lark: str = gbnf_to_lark(_GBNF_CODE_POINT.sub(_plain_character, grammar))
    except RecursionError:
        raise
    except Exception as error:  # the converter raises nothing narrower
        raise _wrong(structured, str(error)) from None
    return lark


def _plain_character(match: re.Match[str]) -> str:
    """A code point in hexadecimal, as itself or, in ASCII, as a byte, which is what the converter reads."""
    backslashes, short, long = match.groups()
    number = int(short or long, 16)
    if number < 0x80:
        return f"{backslashes}\\x{number:02x}"
    if number > 0x10FFFF or 0xD800 <= number < 0xE000:
        raise ValueError(f"\\u{number:04x} is not a character")
    return backslashes + chr(number)


def complaint(structured: StructuredOutput, message: str) -> InvalidRequest:
    """The error for what llguidance said of a constraint when it was compiled or first used."""
    return _wrong(structured, message)


def _wrong(structured: StructuredOutput, message: str) -> InvalidRequest:
    name = "json_schema" if structured.json_object else _name(structured)
    message = _SOURCE_EXCERPT.sub("", message).replace("<non-verbose/>", "").strip()[:_MAX_COMPLAINT]
    for pattern, translate in _COMPLAINTS:
        if match := pattern.search(message):
            message = translate(match)
            break
    label = {"json_schema": "the JSON schema", "regex": "the regular expression", "grammar": "the grammar"}
    return InvalidRequest(f"{label.get(name, 'choices')}: {message}", param=f"structured_output.{name}")


def _name(structured: StructuredOutput) -> str:
    if structured.json_schema is not None:
        return "json_schema"
    if structured.regex is not None:
        return "regex"
    return "grammar" if structured.grammar is not None else "choices"


def _unimplemented(match: re.Match[str]) -> str:
    keywords = ", ".join(json.dumps(name) for name in json.loads(match[1]))
    return f"{keywords} cannot be enforced while text is generated; leave it out of the schema"


_COMPLAINTS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"Unimplemented keys: (\[.*?\])"), _unimplemented),
    (
        re.compile("min/maxProperties only supported"),
        lambda _: '"minProperties" and "maxProperties" are supported where all named properties are required',
    ),
    (re.compile(r"Unknown format: (.*)"), lambda match: f'"format" {match[1]!r} is not supported'),
    (
        re.compile("oneOf constraints are not supported"),
        lambda _: '"oneOf" is supported where its schemas exclude one another; use "anyOf" here',
    ),
    (
        re.compile(r"Pointer '(.*)' does not exist"),
        lambda match: f'"$ref" to #{match[1]}, which is not there',
    ),
    (
        re.compile(r"Resource '(.*)' is not present"),
        lambda match: f'"$ref" to {match[1]!r}, which is outside of the schema; copy it into "$defs"',
    ),
    (re.compile("recursion limit exceeded"), lambda _: "it is nested too deeply"),
    (re.compile("NoExtension"), lambda _: "no text satisfies it"),
    (
        re.compile("[Tt]oo many|[Tt]oo big|TooComplex|lexer precomputation failed"),
        lambda _: "it is too complex; make it simpler",
    ),
    (
        re.compile(r"^regex parse error:\s*(.*)", re.DOTALL),
        lambda match: f'"pattern" is not a regular expression that is supported: {match[1]}',
    ),
)
