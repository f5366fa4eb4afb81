"""Masks over a small vocabulary: what they allow is what the constraint allows, and the end is the end."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from pagewire.base.errors import InvalidRequest, PagewireError
from pagewire.structured import grammars as module
from pagewire.structured.grammars import Grammars, Mask, Matcher
from pagewire.wire.sampling_params import StructuredOutput
from tests.unit.text.conftest import GEMMA_DECODER, byte_level_tokenizer, sentencepiece_tokenizer

EOS = 256  # "<|end|>" of byte_level_tokenizer
VOCAB = 301  # more than the tokenizer's, and not a multiple of 32


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


def allowed(mask: Mask) -> set[int]:
    return {token for token in range(32 * len(mask)) if int(mask[token // 32]) >> token % 32 & 1}


def spell(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def write_at_random(matcher: Matcher, seed: int, most: int) -> tuple[list[int], bool]:
    """Random tokens that the masks allow, and whether they came to the end."""
    draw, written = random.Random(seed), []
    for _ in range(most):
        mask = matcher.mask()
        if mask is None:
            return written, True
        token = draw.choice(sorted(allowed(mask)))
        if token == EOS:
            return written, True
        matcher.advance([token])
        written.append(token)
    return written, False


def test_a_mask_allows_what_may_come_next_and_nothing_beyond_the_vocabulary(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    matcher = grammars.compile(StructuredOutput(choices=["yes", "no", "yeah"]))
    mask = matcher.mask()
    assert mask is not None
    assert len(mask) == -(-VOCAB // 32)
    assert allowed(mask) == {*spell(tokenizer, "y"), *spell(tokenizer, "n")}
    matcher.advance(spell(tokenizer, "ye"))
    mask = matcher.mask()
    assert mask is not None
    assert allowed(mask) == {*spell(tokenizer, "s"), *spell(tokenizer, "a")}
    matcher.advance(spell(tokenizer, "s"))
    assert matcher.mask() is None


def test_the_end_is_allowed_where_the_text_may_end(grammars: Grammars, tokenizer: Tokenizer) -> None:
    matcher = grammars.compile(StructuredOutput(regex="ab*"))
    first = matcher.mask()
    assert first is not None
    assert EOS not in allowed(first)
    matcher.advance(spell(tokenizer, "a"))
    second = matcher.mask()
    assert second is not None
    assert allowed(second) == {EOS, *spell(tokenizer, "b")}


def test_an_empty_text_alone_ends_at_once(grammars: Grammars) -> None:
    assert grammars.compile(StructuredOutput(regex="")).mask() is None


@pytest.mark.parametrize("seed", range(20))
def test_random_texts_under_the_masks_keep_to_a_schema_and_to_a_regular_expression(
    grammars: Grammars, tokenizer: Tokenizer, seed: int
) -> None:
    schema = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["a", "b"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 20},
            "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        },
        "required": ["kind", "count", "flags"],
        "additionalProperties": False,
    }
    matcher = grammars.compile(StructuredOutput(json_schema=json.dumps(schema)))
    written, ended = write_at_random(matcher, seed, 400)
    assert ended
    value = json.loads(tokenizer.decode(written, skip_special_tokens=False))
    assert value["kind"] in ("a", "b")
    assert 0 <= value["count"] <= 20
    assert all(isinstance(flag, bool) for flag in value["flags"])
    assert len(value["flags"]) <= 2
    pattern = r"(ab|c){2,4}-[0-9]{3}"
    written, ended = write_at_random(grammars.compile(StructuredOutput(regex=pattern)), seed, 50)
    assert ended
    assert re.fullmatch(pattern, tokenizer.decode(written))


@pytest.mark.parametrize(
    ("bounds", "kept", "excluded"),
    [
        ({"exclusiveMinimum": 0, "exclusiveMaximum": 0.5}, ["0.1", "0.49"], ["0", "0.0", "0.5"]),
        ({"exclusiveMinimum": 3, "maximum": 3.5}, ["3.1", "3.5"], ["3", "3.0"]),
        ({"exclusiveMaximum": -10.0, "minimum": -10.5}, ["-10.1", "-10.5"], ["-10", "-10.0"]),
        ({"exclusiveMinimum": 0, "minimum": 0.25, "maximum": 0.5}, ["0.25", "0.3"], ["0", "0.2"]),
        ({"exclusiveMinimum": 0, "exclusiveMaximum": 100}, ["1", "0.5", "99"], ["0", "100"]),
    ],
    ids=str,
)
def test_exclusive_bounds_are_excluded(
    grammars: Grammars, tokenizer: Tokenizer, bounds: dict[str, float], kept: list[str], excluded: list[str]
) -> None:
    """Also in properties whose names are those of keywords."""
    number = {"type": "number", **bounds}
    nested = {"type": "object", "properties": {"const": number}, "required": ["const"]}
    for schema, form in ((number, "{}"), (nested | {"additionalProperties": False}, '{{"const":{}}}')):
        structured = StructuredOutput(json_schema=json.dumps(schema))
        grammars.compile(structured)

        def holds(text: str, structured: StructuredOutput = structured, form: str = form) -> bool:
            matcher = grammars.matcher(structured)
            assert matcher is not None
            try:
                matcher.advance(spell(tokenizer, form.format(text)))
            except PagewireError:
                return False
            mask = matcher.mask()
            return mask is None or EOS in allowed(mask)

        assert all(map(holds, kept))
        assert not any(map(holds, excluded))


def test_matchers_of_one_constraint_do_not_share_their_place(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    structured = StructuredOutput(choices=["left", "right"])
    first, second = grammars.compile(structured), grammars.compile(structured)
    first.advance(spell(tokenizer, "l"))
    mask = second.mask()
    assert mask is not None
    assert allowed(mask) == {*spell(tokenizer, "l"), *spell(tokenizer, "r")}
    assert grammars.matcher(structured) is not None


def test_a_matcher_takes_up_an_output_that_it_has_not_seen(grammars: Grammars, tokenizer: Tokenizer) -> None:
    matcher = grammars.compile(StructuredOutput(json_object=True))
    matcher.advance(spell(tokenizer, '{"a":'))
    mask = matcher.mask()
    assert mask is not None
    assert set(spell(tokenizer, '"[{')) <= allowed(mask)
    assert not set(spell(tokenizer, "x}")) & allowed(mask)


def test_a_token_that_no_mask_allowed_is_an_internal_error(grammars: Grammars, tokenizer: Tokenizer) -> None:
    matcher = grammars.compile(StructuredOutput(choices=["yes"]))
    with pytest.raises(PagewireError, match="left its constraint") as caught:
        matcher.advance(spell(tokenizer, "x"))
    assert not isinstance(caught.value, InvalidRequest)


def test_a_constraint_without_any_text_is_refused(grammars: Grammars) -> None:
    with pytest.raises(InvalidRequest, match="no text satisfies it"):
        grammars.compile(StructuredOutput(json_schema='{"$ref": "#"}'))


def test_control_tokens_are_no_text(grammars: Grammars) -> None:
    matcher = grammars.compile(StructuredOutput(regex=r"<.*"))
    first = matcher.mask()
    assert first is not None
    assert EOS not in allowed(first)


def test_a_model_without_a_tokenizer_refuses_and_says_so(tmp_path: Path) -> None:
    grammars = Grammars(str(tmp_path), VOCAB, (EOS,))
    with pytest.raises(InvalidRequest, match=r"needs the model's tokenizer.*tokenizer\.json"):
        grammars.compile(StructuredOutput(regex="a"))


def test_a_model_without_an_end_ends_with_its_grammar(
    tokenizer: Tokenizer, tmp_path: Path, save_tokenizer: Callable[[Tokenizer], Path]
) -> None:
    grammars = Grammars(str(save_tokenizer(tokenizer)), VOCAB, ())
    matcher = grammars.compile(StructuredOutput(choices=["a"]))
    mask = matcher.mask()
    assert mask is not None
    assert allowed(mask) == set(spell(tokenizer, "a"))
    matcher.advance(spell(tokenizer, "a"))
    assert matcher.mask() is None
    grammars.close()


def test_sentencepiece_tokens_and_single_bytes_are_text(
    save_tokenizer: Callable[[Tokenizer], Path],
) -> None:
    tokenizer = sentencepiece_tokenizer(GEMMA_DECODER)
    size = tokenizer.get_vocab_size()
    grammars = Grammars(str(save_tokenizer(tokenizer)), size, (2,))
    matcher = grammars.compile(StructuredOutput(choices=["ab 漢ü"]))
    written: list[int] = []
    while (mask := matcher.mask()) is not None:
        token = max(allowed(mask))
        matcher.advance([token])
        written.append(token)
    assert tokenizer.decode(written, skip_special_tokens=False) == "ab 漢ü"
    grammars.close()


def test_what_was_not_used_for_longest_is_forgotten(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_GRAMMARS", 2)
    first, second, third = (StructuredOutput(regex=f"x{number}") for number in range(3))
    grammars.compile(first)
    grammars.compile(second)
    assert grammars.matcher(first) is not None
    grammars.compile(third)
    assert grammars.matcher(second) is None
    assert grammars.matcher(first) is not None
