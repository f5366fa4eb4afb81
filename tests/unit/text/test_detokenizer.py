"""A streamed text is the tokenizer's own decode of all its ids, and never shows half a character."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from frontend.text.detokenizer import IncrementalDetokenizer
from frontend.text.tokenizer import TextTokenizer
from tests.unit.text.conftest import (
    GEMMA_DECODER,
    LLAMA_DECODER,
    SPACE,
    SaveTokenizer,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
)

TOKENIZERS = {
    "byte-level": byte_level_tokenizer(),
    "llama": sentencepiece_tokenizer(LLAMA_DECODER),
    "gemma": sentencepiece_tokenizer(GEMMA_DECODER),
    "metaspace": sentencepiece_tokenizer(decoders.Metaspace()),
    "metaspace-never": sentencepiece_tokenizer(decoders.Metaspace(prepend_scheme="never")),
    "strip-three": sentencepiece_tokenizer(
        decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 3, 0)])
    ),
}
TEXT = "Tab a  be. ééé 漢字 日本 😀👩‍👩‍👧 two words <|end|> a\n\tb"


def stream(detokenizer: IncrementalDetokenizer, ids: Sequence[int], cuts: Sequence[int]) -> list[str]:
    borders = [0, *sorted(cuts), len(ids)]
    pushed = [detokenizer.push(ids[a:b]) for a, b in pairwise(borders)]
    return [*pushed, detokenizer.flush()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("skip", [False, True])
def test_any_ids_in_any_portions_give_the_tokenizers_own_text(
    save_tokenizer: SaveTokenizer, kind: str, skip: bool
) -> None:
    reference = TOKENIZERS[kind]
    tokenizer = TextTokenizer.load(save_tokenizer(reference))
    some_ids = st.integers(0, tokenizer.vocab_size + 5) | st.sampled_from(reference.encode(TEXT).ids)

    @settings(deadline=None, max_examples=100)
    @given(st.lists(some_ids, max_size=30), st.data())
    def check(ids: list[int], data: st.DataObject) -> None:
        cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=8))
        streamed = stream(tokenizer.new_detokenizer(skip_special_tokens=skip), ids, cuts)
        assert "".join(streamed) == reference.decode(ids, skip_special_tokens=skip)

    check()


@pytest.mark.parametrize("skip", [False, True])
def test_smollm2_texts_and_random_ids_come_out_whole(
    smollm2_tokenizer: TextTokenizer, smollm2_dir: Path, skip: bool
) -> None:
    reference = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))

    @settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
    @given(
        st.text().map(lambda text: smollm2_tokenizer.encode(text))
        | st.lists(st.integers(0, smollm2_tokenizer.vocab_size - 1))
    )
    def check(ids: list[int]) -> None:
        streamed = stream(smollm2_tokenizer.new_detokenizer(skip_special_tokens=skip), ids, range(len(ids)))
        assert "".join(streamed) == reference.decode(ids, skip_special_tokens=skip)

    check()


@pytest.mark.parametrize("kind", ["byte-level", "llama"])
def test_no_push_of_a_valid_text_ends_within_a_character(save_tokenizer: SaveTokenizer, kind: str) -> None:
    tokenizer = TextTokenizer.load(save_tokenizer(TOKENIZERS[kind]))
    text = "a é 漢字 😀👩‍👩‍👧 b"
    ids = tokenizer.encode(text)
    detokenizer = tokenizer.new_detokenizer(skip_special_tokens=True)
    pieces = [detokenizer.push([token_id]) for token_id in ids] + [detokenizer.flush()]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces) == text
    assert pieces.count("") > 4  # the bytes that waited for the rest of their character


def test_special_tokens_appear_whole_or_not_at_all(smollm2_tokenizer: TextTokenizer) -> None:
    ids = smollm2_tokenizer.encode("a<|im_end|>b")
    shown = smollm2_tokenizer.new_detokenizer(skip_special_tokens=False)
    hidden = smollm2_tokenizer.new_detokenizer(skip_special_tokens=True)
    assert [shown.push([token_id]) for token_id in ids] == ["a", "<|im_end|>", "b"]
    assert [hidden.push([token_id]) for token_id in ids] == ["a", "", "b"]


def test_an_unfinished_character_at_the_end_is_a_replacement(smollm2_tokenizer: TextTokenizer) -> None:
    ids = smollm2_tokenizer.encode("x 😀")
    detokenizer = smollm2_tokenizer.new_detokenizer(skip_special_tokens=True)
    assert detokenizer.push(ids[:-1]) == "x "
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"


def test_streaming_costs_little_beside_a_forward_pass(smollm2_tokenizer: TextTokenizer) -> None:
    """One microsecond a token is the aim; ten is still nothing, and holds on a busy machine."""
    ids = smollm2_tokenizer.encode("The quick brown fox jumps over the lazy dog, naïvely. ") * 2000
    detokenizer = smollm2_tokenizer.new_detokenizer(skip_special_tokens=True)
    start = time.process_time()
    for token_id in ids:
        detokenizer.push((token_id,))
    assert (time.process_time() - start) / len(ids) < 10e-6
