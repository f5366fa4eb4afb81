"""Text to ids as the model's tokenizer.json says, and errors for what it cannot do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.processors import TemplateProcessing

from frontend.text.tokenizer import TextTokenizer
from pagewire.base.errors import ConfigError, InvalidRequest
from tests.unit.text.conftest import (
    LLAMA_DECODER,
    SaveTokenizer,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
)


def test_a_text_survives_the_round_trip(smollm2_tokenizer: TextTokenizer) -> None:
    text = "Hello, wörld! 123 日本語 😀\n\tdef f(): pass"
    ids = smollm2_tokenizer.encode(text)
    assert smollm2_tokenizer.decode(ids, skip_special_tokens=True) == text
    assert b"".join(smollm2_tokenizer.token_bytes(token_id) for token_id in ids) == text.encode()


def test_special_tokens_are_known_and_can_be_left_out(smollm2_tokenizer: TextTokenizer) -> None:
    ids = smollm2_tokenizer.encode("a<|im_end|>")
    assert ids[-1] == 2
    assert smollm2_tokenizer.special_ids == frozenset(range(17))
    assert smollm2_tokenizer.decode(ids, skip_special_tokens=False) == "a<|im_end|>"
    assert smollm2_tokenizer.decode(ids, skip_special_tokens=True) == "a"
    assert smollm2_tokenizer.token_text(2) == "<|im_end|>"


def test_the_post_processor_says_what_surrounds_a_text(save_tokenizer: SaveTokenizer) -> None:
    original = sentencepiece_tokenizer(LLAMA_DECODER)
    original.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = TextTokenizer.load(save_tokenizer(original))
    assert tokenizer.encode("ab")[0] == 1
    assert tokenizer.encode("ab", add_special_tokens=False) == tokenizer.encode("ab")[1:]


def test_tokens_stand_for_bytes_in_both_kinds(save_tokenizer: SaveTokenizer) -> None:
    tokenizer = TextTokenizer.load(save_tokenizer(sentencepiece_tokenizer(LLAMA_DECODER)))
    assert tokenizer.token_bytes(3 + 0xC3) == b"\xc3"
    assert tokenizer.token_text(3 + 0xC3) == "\N{REPLACEMENT CHARACTER}"
    assert tokenizer.encode(" a", add_special_tokens=False)
    assert tokenizer.token_text(tokenizer.encode("a")[0]) == " a"
    tokenizer = TextTokenizer.load(save_tokenizer(byte_level_tokenizer()))
    assert [tokenizer.token_bytes(token_id) for token_id in tokenizer.encode("é 日本")] == [
        b"\xc3",
        b"\xa9",
        b" ",
        "日本".encode(),
    ]
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.token_bytes(-1) == b""


def test_settings_of_the_training_run_do_not_cut_or_pad_prompts(save_tokenizer: SaveTokenizer) -> None:
    original = byte_level_tokenizer()
    original.enable_truncation(max_length=4)
    original.enable_padding(length=8)
    tokenizer = TextTokenizer.load(save_tokenizer(original))
    assert len(tokenizer.encode("abcdefghijkl")) == 12
    assert len(tokenizer.encode("ab")) == 2


def test_threads_may_share_it(smollm2_tokenizer: TextTokenizer) -> None:
    texts = [f"number {index} " * 50 for index in range(64)]
    expected = [smollm2_tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(smollm2_tokenizer.encode, texts)) == expected


def test_half_a_surrogate_pair_is_refused(smollm2_tokenizer: TextTokenizer) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        smollm2_tokenizer.encode("a\ud800b")


@pytest.mark.parametrize("token_id", [-1, 49152, 2**40])
def test_ids_without_a_token_cannot_be_decoded(smollm2_tokenizer: TextTokenizer, token_id: int) -> None:
    with pytest.raises(InvalidRequest, match=f"{token_id} does not exist; ids are between 0 and 49151"):
        smollm2_tokenizer.decode([5, token_id], skip_special_tokens=True)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer that is read"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not a tokenizer"):
        TextTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("decoder", "said"),
    [
        (decoders.WordPiece(), "WordPiece"),
        (decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()]), r"Fuse \+ ByteFallback"),
        (decoders.Sequence([]), "decoder is"),
        (None, "no decoder"),
    ],
)
def test_a_decoder_that_cannot_be_streamed_is_refused(
    save_tokenizer: SaveTokenizer, decoder: decoders.Decoder | None, said: str
) -> None:
    original = byte_level_tokenizer()
    if decoder is None:
        original = Tokenizer(original.model)
    else:
        original.decoder = decoder
    with pytest.raises(ConfigError, match=said):
        TextTokenizer.load(save_tokenizer(original))
