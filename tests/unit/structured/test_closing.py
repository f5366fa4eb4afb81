"""Objects have the properties that their schema names, and no others, unless the schema says what others."""

from __future__ import annotations

import enum
import json
import random
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union

import jsonschema
import pytest
from pydantic import BaseModel, ConfigDict, Field, create_model
from tokenizers import Tokenizer

from pagewire.structured.closing import close_objects, with_closed_objects
from pagewire.structured.grammars import Grammars, Matcher
from pagewire.wire.sampling_params import MAX_CONSTRAINT_LENGTH, StructuredOutput
from tests.unit.structured.test_grammars import EOS, VOCAB, allowed
from tests.unit.text.conftest import byte_level_tokenizer

INT = {"type": "integer"}
BASE = {"type": "object", "properties": {"a": INT}, "required": ["a"]}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grammars]:
    directory = tmp_path_factory.mktemp("bytes")
    tokenizer.save(str(directory / "tokenizer.json"))
    grammars = Grammars(str(directory), VOCAB, (EOS,))
    yield grammars
    grammars.close()


def of(schema: Any) -> StructuredOutput:
    return with_closed_objects(StructuredOutput(json_schema=json.dumps(schema)))


def accepts(grammars: Grammars, tokenizer: Tokenizer, constraint: StructuredOutput, text: str) -> bool:
    matcher = grammars.compile(constraint)
    for token in tokenizer.encode(text, add_special_tokens=False).ids:
        mask = matcher.mask()
        if mask is None or token not in allowed(mask):
            return False
        matcher.advance([token])
    mask = matcher.mask()
    return mask is None or EOS in allowed(mask)


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        pytest.param(BASE, ['{"a":1}'], ['{"a":1,"b":1}'], id="properties"),
        pytest.param({"type": "object", "properties": {}}, ["{}"], ['{"b":1}'], id="no properties"),
        pytest.param(
            {"type": "array", "items": {"properties": {"x": BASE}}},
            ['[{"x":{"a":1}}]'],
            ['[{"y":1}]', '[{"x":{"a":1,"y":1}}]'],
            id="nested",
        ),
        pytest.param(
            {"type": "object", "patternProperties": {"^a": INT}}, ['{"a1":1}'], ['{"b":1}'], id="patterns"
        ),
        pytest.param(
            {"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}}}},
            ['{"n":{"n":{}}}'],
            ['{"m":1}', '{"n":{"m":1}}'],
            id="recursive",
        ),
        pytest.param(
            {"$defs": {"b": BASE}, "anyOf": [{"$ref": "#/$defs/b"}, {"type": "null"}]},
            ['{"a":1}', "null"],
            ['{"a":1,"b":1}'],
            id="optional",
        ),
        pytest.param(
            {"$defs": {"b": BASE}, "allOf": [{"$ref": "#/$defs/b"}], "description": "as pydantic 2.0 has it"},
            ['{"a":1}'],
            ['{"a":1,"b":1}'],
            id="allOf of one",
        ),
        pytest.param(
            {
                "$defs": {"b": BASE},
                "allOf": [
                    {"$ref": "#/$defs/b"},
                    {"properties": {"b": INT, "c": {"$ref": "#/$defs/b"}}, "required": ["b"]},
                ],
            },
            ['{"a":1,"b":1}', '{"a":1,"b":1,"c":{"a":1}}'],
            ['{"a":1}', '{"b":1}', '{"a":1,"b":1,"d":1}', '{"a":1,"b":1,"c":{"a":1,"d":1}}'],
            id="allOf",
        ),
        pytest.param(
            {"$defs": {"b": BASE}, "$ref": "#/$defs/b", "properties": {"b": INT}, "required": ["b"]},
            ['{"a":1,"b":1}'],
            ['{"a":1}', '{"b":1}', '{"a":1,"b":1,"d":1}'],
            id="reference with neighbours",
        ),
        pytest.param(
            {
                "type": "object",
                "properties": {"k": {"enum": ["a", "b"]}},
                "required": ["k"],
                "oneOf": [
                    {"properties": {"k": {"const": "a"}, "x": INT}, "required": ["x"]},
                    {"properties": {"k": {"const": "b"}, "y": INT}, "required": ["y"]},
                ],
            },
            ['{"k":"a","x":1}', '{"k":"b","y":1}'],
            ['{"k":"a"}', '{"k":"a","y":1}', '{"k":"a","x":1,"y":1}', '{"k":"b","y":1,"z":1}'],
            id="alternatives beside properties",
        ),
        pytest.param(
            {
                "properties": {"a": INT, "b": INT},
                "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
            },
            ['{"a":1}', '{"b":1}', '{"a":1,"b":1}'],
            ["{}", '{"a":1,"c":1}'],
            id="alternatives that only require",
        ),
        pytest.param(
            {
                "allOf": [
                    {"anyOf": [{"properties": {"a": INT}}, {"properties": {"b": INT}}]},
                    {"properties": {"c": INT}},
                ]
            },
            ['{"a":1,"c":1}', '{"b":1,"c":1}'],
            ['{"d":1}'],
            id="alternatives in an allOf",
        ),
        pytest.param({**BASE, "required": ["a", "z"]}, ['{"a":1,"z":[2]}'], ['{"a":1}'], id="required only"),
    ],
)
def test_objects_have_no_properties_but_those_that_are_named(
    grammars: Grammars, tokenizer: Tokenizer, schema: Any, right: list[str], wrong: list[str]
) -> None:
    closed = of(schema)
    for text in right:
        assert accepts(grammars, tokenizer, closed, text), text
        jsonschema.validate(json.loads(text), schema)
    for text in wrong:
        assert not accepts(grammars, tokenizer, closed, text), text


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        pytest.param({"type": "object"}, '{"b":1}', id="no properties named"),
        pytest.param({**BASE, "additionalProperties": True}, '{"a":1,"b":[1]}', id="true"),
        pytest.param({**BASE, "additionalProperties": INT}, '{"a":1,"b":1}', id="a schema"),
        pytest.param(
            {"allOf": [BASE, {"properties": {"b": INT}, "additionalProperties": True}]},
            '{"a":1,"z":1}',
            id="said by another schema for the same object",
        ),
        pytest.param(
            {"properties": {"a": INT, "b": INT}, "required": ["a", "b"], "minProperties": 3},
            '{"a":1,"b":1,"c":1}',
            id="more asked for than named",
        ),
        pytest.param({"enum": [{"b": 1}], "properties": {"a": INT}}, '{"b":1}', id="whole values"),
    ],
)
def test_schemas_that_want_other_properties_stay_open(
    grammars: Grammars, tokenizer: Tokenizer, schema: Any, text: str
) -> None:
    assert close_objects(schema) == schema
    assert accepts(grammars, tokenizer, of(schema), text)


def test_names_that_are_those_of_keywords_and_values_that_look_like_schemas_are_left() -> None:
    schema = {
        "properties": {"properties": {"const": {"properties": {}}}, "$ref": {"default": {"properties": {}}}},
        "additionalProperties": False,
    }
    assert close_objects(schema) == schema


@pytest.mark.parametrize(
    "schema",
    [
        True,
        [],
        "x",
        {"properties": [], "required": True, "allOf": {}, "$ref": 1, "items": None, "enum": 3},
        {"allOf": [{"$ref": "#/allOf/0"}, {"properties": {"a": {}}}]},
        {"allOf": [{"$ref": "#nowhere"}, {"$ref": "#/a/b"}, {"properties": {"a": {}}}]},
        {"$defs": [], "allOf": [{"$ref": "#/x"}, {"properties": {"a": {}}}], "x": {"properties": {"b": {}}}},
    ],
)
def test_what_is_no_schema_is_left_to_the_compiler(schema: Any) -> None:
    close_objects(schema)


def test_a_schema_that_takes_too_long_or_grows_too_large_keeps_its_letter() -> None:
    deep: Any = {"properties": {"a": {}}}
    for level in range(300):
        names = {f"{level} {index}": {} for index in range(20)}
        deep = {"allOf": [deep, {"properties": names}]}
    nested: Any = {"type": "integer"}
    for _ in range(5000):
        nested = {"items": nested}
    wide = {"properties": {f"{index:0200}": {} for index in range(600)}}
    large = {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "$defs": {"a": wide, "b": wide}}
    began = time.perf_counter()
    assert close_objects(deep) is deep
    assert close_objects(nested) is nested
    assert len(json.dumps(large)) < MAX_CONSTRAINT_LENGTH
    assert of(large).json_schema == json.dumps(large)
    assert time.perf_counter() - began < 5


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Models:
    """Random pydantic models, as people write them and, of the same fields, such that refuse all else."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self._count = 0

    def model(self, depth: int = 0, **fields: Any) -> tuple[type[BaseModel], type[BaseModel]]:
        self._count += 1
        name = f"Model{self._count}"
        lenient, strict = dict(fields), dict(fields)
        for number in range(self._draw.randint(0, 3)):
            mine, theirs = self._type(depth + 1)
            default: Any = ... if self._draw.random() < 0.6 else None
            optional = default is None
            lenient[f"f{number}"] = (Union[mine, None] if optional else mine, default)  # noqa: UP007
            strict[f"f{number}"] = (Union[theirs, None] if optional else theirs, default)  # noqa: UP007
        return (
            create_model(name, **lenient),
            create_model(name, __config__=ConfigDict(extra="forbid"), **strict),
        )

    def _type(self, depth: int) -> tuple[Any, Any]:
        kinds: list[Any] = [str, int, float, bool, Colour, Literal["x", "y"], list[int], dict[str, int]]
        kinds += [tuple[int, str], Annotated[str, Field(max_length=4)], Annotated[int, Field(ge=3, lt=9)]]
        kind = self._draw.randrange(len(kinds) + (4 if depth < 4 else 0))
        if kind < len(kinds):
            return kinds[kind], kinds[kind]
        mine, theirs = self.model(depth)
        match kind - len(kinds):
            case 0:
                return mine, theirs
            case 1:
                return list[mine], list[theirs]  # type: ignore[valid-type]
            case 2:
                return dict[str, mine], dict[str, theirs]  # type: ignore[valid-type]
        other, others = self.model(depth, kind=(Literal["other"], ...))
        mine, theirs = self.model(depth, kind=(Literal["mine"], ...))
        tag = Field(discriminator="kind")
        return Annotated[mine | other, tag], Annotated[theirs | others, tag]


def write(matcher: Matcher, draw: random.Random) -> str | None:
    """Random ASCII that the masks allow, what ends things rather than other; None if no end comes."""
    written = bytearray()
    for _ in range(4000):
        mask = matcher.mask()
        if mask is None:
            return written.decode()
        tokens = allowed(mask) & {*BYTES, EOS}
        ending = tokens.intersection(ENDING) or tokens
        token = draw.choice(sorted(ending if draw.random() < 0.7 else tokens))
        if token == EOS:
            return written.decode()
        matcher.advance([token])
        written += BYTES[token]
    return None


_SPELT = byte_level_tokenizer()
BYTES = {_SPELT.encode(chr(code), add_special_tokens=False).ids[0]: bytes([code]) for code in range(128)}
ENDING = {token for token, data in BYTES.items() if data in b'"}],:'} | {EOS}


@pytest.mark.parametrize("seed", range(25))
def test_answers_of_random_pydantic_models_end_and_have_no_properties_of_their_own(
    grammars: Grammars, seed: int
) -> None:
    draw = random.Random(seed)
    model, exact = Models(seed).model(f=(int, ...))
    schema = model.model_json_schema()
    assert "additionalProperties" not in schema
    constraint = of(schema)
    for _ in range(2):
        text = write(grammars.compile(constraint), draw)
        assert text is not None
        exact.model_validate_json(text)
        jsonschema.validate(json.loads(text), schema)


def test_by_the_letter_objects_have_properties_of_their_own(grammars: Grammars, tokenizer: Tokenizer) -> None:
    letter = StructuredOutput(json_schema=json.dumps(BASE))
    assert accepts(grammars, tokenizer, letter, '{"a":1,"b":1}')
