"""Which constraints are served and what is said of the others; hostile ones included."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pagewire.base.errors import InvalidRequest
from pagewire.structured.checker import ConstraintChecker
from pagewire.wire.sampling_params import StructuredOutput


@pytest.fixture(scope="module")
def checker() -> Iterator[ConstraintChecker]:
    checker = ConstraintChecker(seconds=1.0)
    yield checker
    checker.close()


@pytest.mark.parametrize(
    "structured",
    [
        StructuredOutput(json_object=True),
        StructuredOutput(json_schema='{"type": "object", "properties": {"a": {"enum": [1, null]}}}'),
        StructuredOutput(json_schema="true"),
        StructuredOutput(regex=r"[a-z]+@\w{2,5}"),
        StructuredOutput(regex=""),
        StructuredOutput(choices=["", "a.b|c", "line\nbreak/", '"quoted\\"']),
        StructuredOutput(grammar='root ::= "a" rest?\nrest ::= [0-9]+ | "\\u00e9" root'),
        StructuredOutput(grammar='start: "a" NUMBER\nNUMBER: /[0-9]+/'),
    ],
    ids=repr,
)
def test_each_kind_of_constraint_compiles(checker: ConstraintChecker, structured: StructuredOutput) -> None:
    assert checker.check(structured).grammar


@pytest.mark.parametrize(
    ("structured", "named"),
    [
        (StructuredOutput(json_schema='{"if": {}, "not": {}}'), '"if", "not"'),
        (StructuredOutput(json_schema='{"properties": {"a": {"uniqueItems": true}}}'), '"uniqueItems"'),
        (StructuredOutput(json_schema='{"x-guidance": {"lenient": true}, "not": {}}'), '"not"'),
        (StructuredOutput(json_schema='{"type": "string", "format": "poem"}'), "\"format\" 'poem'"),
        (StructuredOutput(json_schema='{"oneOf": [{}, {"type": "string"}]}'), '"oneOf"'),
        (StructuredOutput(json_schema='{"$ref": "#/$defs/a"}'), '"$ref" to #/$defs/a'),
        (StructuredOutput(json_schema='{"$ref": "https://example.com/a"}'), '"$ref"'),
        (StructuredOutput(json_schema='{"type": "string", "pattern": "(?=a)"}'), '"pattern"'),
        (StructuredOutput(json_schema='{"minLength": "2"}'), "'minLength'"),
        (StructuredOutput(json_schema='{"type": "thing"}'), "thing"),
        (StructuredOutput(json_schema='{"type": "integer", "minimum": 2, "maximum": 1}'), "minimum (2)"),
        (StructuredOutput(json_schema='{"items":' * 200 + "{}" + "}" * 200), "too deeply"),
        (StructuredOutput(json_schema="{"), "not JSON"),
        (StructuredOutput(json_schema="[]"), "must be an object"),
        (StructuredOutput(regex="(a"), "unclosed group"),
        (StructuredOutput(regex=r"\bword\b"), "lookarounds not supported"),
        (StructuredOutput(regex="\ud800"), "valid Unicode"),
        (StructuredOutput(grammar="root ::= missing"), "'missing' not found"),
        (StructuredOutput(grammar='root ::= "\\ud800"'), "\\ud800 is not a character"),
        (StructuredOutput(grammar="start: missing"), 'unknown name: "missing"'),
        (StructuredOutput(grammar='other: "a"'), "no start rule"),
        (StructuredOutput(grammar="root ::= " + "(" * 5000), "too deeply"),
    ],
)
def test_an_error_names_what_is_wrong(
    checker: ConstraintChecker, structured: StructuredOutput, named: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        checker.check(structured)
    assert named in caught.value.message
    assert (caught.value.param or "").startswith("structured_output.")


def test_constraints_that_kill_or_stall_the_compiler_are_refused_and_harm_nothing_else(
    checker: ConstraintChecker,
) -> None:
    chain = "".join(f'r{i}: r{i + 1} "a"\n' for i in range(6000))
    with pytest.raises(InvalidRequest, match="too large or too deeply nested"):
        checker.check(StructuredOutput(grammar=f'start: r0\n{chain}r6000: "b"'))
    rules = "".join(f'r{i} ::= r{i + 1} "a"\n' for i in range(8000))
    with pytest.raises(InvalidRequest, match="takes more than 1 s"):
        checker.check(StructuredOutput(grammar=f'root ::= r0\n{rules}r8000 ::= "b"\n'))
    assert checker.check(StructuredOutput(regex="still [a-z]+")).grammar


def test_a_lost_process_is_replaced() -> None:
    checker = ConstraintChecker()
    assert checker.check(StructuredOutput(regex="a")).grammar
    assert checker._process is not None
    checker._process.kill()
    checker._process.wait()
    assert checker.check(StructuredOutput(regex="b")).grammar
    checker.close()
