"""A vocab.json with its merges.txt runs as tokenizer.json, with the ids of transformers' tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from frontend.text.tokenizer import TextTokenizer
from pagewire.base.errors import ConfigError
from pagewire.hub.tokenizer.files import has_tokenizer, tokenizer_file
from tests.unit.hub.conftest import train_tokenizer
from tests.unit.hub.sentencepiece_models import texts

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEWIRE_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    model: dict[str, Any] = json.loads(
        train_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False)).to_str()
    )["model"]
    return model


def write(directory: Path, model: dict[str, Any], tokenizer_class: str = "Qwen2Tokenizer") -> Path:
    merges = [" ".join(merge) for merge in model["merges"]]
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    first = max(model["vocab"].values()) + 1
    added = {str(first + index): {"content": name, "special": True} for index, name in enumerate(SPECIALS)}
    config = {"tokenizer_class": tokenizer_class, "added_tokens_decoder": added, "eos_token": SPECIALS[2]}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_ids_are_those_of_transformers(tmp_path: Path, trained: dict[str, Any]) -> None:
    from transformers import Qwen2Tokenizer

    tokenizer = TextTokenizer.load(write(tmp_path, trained))
    theirs = Qwen2Tokenizer.from_pretrained(tmp_path)
    assert set(tokenizer.special_tokens) == set(SPECIALS)
    for text in [*texts(), "a<|im_start|>b<|im_end|>", "e\u0301 12345 it's  \n\n x"]:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text), text
        assert tokenizer.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_another_merges_file_is_another_conversion(tmp_path: Path, trained: dict[str, Any]) -> None:
    first = tokenizer_file(write(tmp_path, trained))
    assert tokenizer_file(tmp_path) == first
    write(tmp_path, {**trained, "merges": trained["merges"][:-1]})
    assert tokenizer_file(tmp_path) != first


def test_the_models_type_says_how_texts_are_split_where_no_class_is_named(
    tmp_path: Path, trained: dict[str, Any]
) -> None:
    write(tmp_path, trained, "")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    assert TextTokenizer.load(tmp_path).encode("123") == [trained["vocab"][digit] for digit in "123"]


@pytest.mark.parametrize("tokenizer_class", ["GPT2Tokenizer", ""])
def test_a_tokenizer_that_does_not_say_how_it_splits_texts_is_refused(
    tmp_path: Path, trained: dict[str, Any], tokenizer_class: str
) -> None:
    write(tmp_path, trained, tokenizer_class)
    with pytest.raises(ConfigError, match=f"merges.txt of {tokenizer_class or 'an unknown'}.*tokenizer.json"):
        tokenizer_file(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("merges.txt", b"a b\nzz yy\n", "merges.txt: line 2 is no pair of tokens"),
        ("merges.txt", b"a\n", "line 1 is no pair"),
        ("merges.txt", b"\xff", "merges.txt: is not UTF-8"),
        ("vocab.json", b'{"a": "x"}', "the token 'a' has the id 'x'"),
        ("vocab.json", b'{"a": 1, "b": 1}', "two tokens have one id"),
        ("vocab.json", b"{", "vocab.json"),
    ],
)
def test_wrong_files_are_named(
    tmp_path: Path, trained: dict[str, Any], name: str, content: bytes, said: str
) -> None:
    write(tmp_path, {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [("a", "b")]})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        tokenizer_file(tmp_path)


def test_either_file_alone_is_no_tokenizer(tmp_path: Path, trained: dict[str, Any]) -> None:
    write(tmp_path, trained)
    assert has_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    assert not has_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"vocab\.json with merges\.txt"):
        tokenizer_file(tmp_path)
