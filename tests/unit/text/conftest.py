"""Tokenizers of the two kinds: byte-level ones, and SentencePiece-style ones built here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from frontend.text.tokenizer import TextTokenizer

SaveTokenizer = Callable[[Tokenizer], Path]

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
LLAMA_DECODER = decoders.Sequence(
    [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
GEMMA_DECODER = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])


def sentencepiece_tokenizer(decoder: Any) -> Tokenizer:
    """As Llama 2's: a few words, a token for each byte, and spaces written as a block."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in [SPACE, *"abcdeTh.,!é漢", SPACE + "a", SPACE + "b", "ab", SPACE * 2, SPACE + "ab"]:
        vocab[piece] = len(vocab)
    merges = [(SPACE, "a"), (SPACE, "b"), ("a", "b"), (SPACE, SPACE), (SPACE + "a", "b")]
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def byte_level_tokenizer() -> Tokenizer:
    """Every byte, two added words, one of them outside the byte alphabet, and control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<｜fin｜>"])
    tokenizer.add_tokens(["two words", "日本"])
    return tokenizer


@pytest.fixture
def save_tokenizer(tmp_path: Path) -> SaveTokenizer:
    """Writes a tokenizer into a model directory."""

    def save(tokenizer: Tokenizer) -> Path:
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        return tmp_path

    return save


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_dir: Path) -> TextTokenizer:
    return TextTokenizer.load(smollm2_dir)
