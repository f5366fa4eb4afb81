"""tiktoken files run as tokenizer.json with tiktoken's ids."""

from __future__ import annotations

import base64
import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from tokenizers import pre_tokenizers

from frontend.text.tokenizer import TextTokenizer
from pagewire.base.errors import ConfigError
from pagewire.hub.tokenizer.byte_level import byte_level_bytes
from pagewire.hub.tokenizer.token_pieces import read_tokenizer
from tests.unit.hub.conftest import train_tokenizer
from tests.unit.hub.sentencepiece_models import texts

# As Qwen's and GLM-4's own tokenizers have them.
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GLM4 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEWIRE_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """Every byte, and what a training joined, in its order."""
    trained = json.loads(train_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False)).to_str())
    joined = [byte_level_bytes("".join(merge)) for merge in trained["model"]["merges"]]
    tokens = [bytes([byte]) for byte in range(256)] + [*dict.fromkeys(joined)]
    return {token: rank for rank, token in enumerate(tokens)}


def write(directory: Path, name: str, ranks: dict[bytes, int], config: dict[str, Any]) -> None:
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    (directory / name).write_text("\n".join(lines) + "\n")
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def test_qwens_ids_equal_those_of_tiktoken(tmp_path: Path, ranks: dict[bytes, int]) -> None:
    write(tmp_path, "qwen.tiktoken", ranks, {"tokenizer_class": "QWenTokenizer"})
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{index}|>" for index in range(205))]
    specials = {name: len(ranks) + index for index, name in enumerate(names)}
    library = tiktoken.Encoding("Qwen", pat_str=QWEN, mergeable_ranks=ranks, special_tokens=specials)
    tokenizer = TextTokenizer.load(tmp_path)
    assert tokenizer.special_tokens == specials
    for text in [*texts(), "a<|im_start|>b<|extra_204|><|endoftext|>", "e\u0301"]:
        composed = unicodedata.normalize("NFC", text)
        ids = tokenizer.encode(text)
        assert ids == library.encode(composed, allowed_special="all"), text
        assert tokenizer.decode(ids, skip_special_tokens=False) == composed


def test_glm4s_ids_equal_those_of_tiktoken_and_begin_with_its_prefix(
    tmp_path: Path, ranks: dict[bytes, int]
) -> None:
    names = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|user|>"]
    specials = {name: len(ranks) + 3 + index for index, name in enumerate(names)}
    added = {str(token_id): {"content": name, "special": True} for name, token_id in specials.items()}
    config = {"tokenizer_class": "ChatGLM4Tokenizer", "added_tokens_decoder": added}
    write(tmp_path, "tokenizer.model", ranks, config)
    library = tiktoken.Encoding("GLM-4", pat_str=GLM4, mergeable_ranks=ranks, special_tokens={})
    tokenizer = TextTokenizer.load(tmp_path)
    prefix = [specials["[gMASK]"], specials["<sop>"]]
    for text in texts():
        assert tokenizer.encode(text) == [*prefix, *library.encode(text)], text


def test_every_byte_comes_back_and_text_that_comes_token_by_token_equals_the_whole(
    tmp_path: Path, ranks: dict[bytes, int]
) -> None:
    write(tmp_path, "qwen.tiktoken", ranks, {})
    tokenizer = TextTokenizer.load(tmp_path)
    assert [tokenizer.token_bytes(rank) for rank in ranks.values()] == list(ranks)
    generator = random.Random(0)
    for _ in range(200):
        ids = generator.choices(range(tokenizer.vocab_size), k=20)
        detokenizer = tokenizer.new_detokenizer(skip_special_tokens=False)
        pieces = [detokenizer.push((token_id,)) for token_id in ids]
        whole = tokenizer.decode(ids, skip_special_tokens=False)
        assert "".join(pieces) + detokenizer.flush() == whole


@pytest.mark.parametrize(
    ("content", "config", "said"),
    [
        (b"YQ== 0\nYg== x\n", {}, "line 2 is no token in base64 with its rank"),
        (b"YQ== 0\nYg== 0\n", {}, "two tokens have one rank"),
        (b"YQ== 0\n", {"tokenizer_class": "LlamaTokenizer"}, "a tiktoken file of LlamaTokenizer"),
        (b"YQ== 0\nYg== 99999999999\n", {}, "line 2"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, content: bytes, config: dict[str, Any], said: str) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=said) as raised:
        read_tokenizer(tmp_path)
    assert str(tmp_path) in raised.value.message
