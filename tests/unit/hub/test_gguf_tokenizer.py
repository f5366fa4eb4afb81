"""A tokenizer rebuilt from GGUF metadata gives the ids of the one it was made from."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import regex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from pagewire.base.errors import ConfigError
from pagewire.hub.gguf_reader import read_gguf
from pagewire.hub.gguf_tokenizer import write_tokenizer
from tests.unit.hub.conftest import BuildGguf, train_tokenizer

TEXTS = [
    "",
    " ",
    "Hello world",
    "   leading   spaces\r\n\ttabs",
    "I'll we've DON'T it's",
    "12345 67 1,000.50 x=1;y=22",
    "naïve café ½ ² ٣٤٥ Ⅷ",
    "漢字 日本語 한국어 עברית हिन्दी 😀👩‍👩‍👧 e\u0301",
    "def f(x):\n\treturn x**2  # ok\n\n\n",
    "\u200b\xa0zero\x00 width\ufeff",
]


def convert(path: Path, directory: Path) -> Tokenizer:
    directory.mkdir(exist_ok=True)
    write_tokenizer(read_gguf(path), directory, 128)
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def split_then_bytes(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def reference_tokenizer(pre: str) -> Tokenizer:
    """Trained with the pre-tokenizer that transformers has for the family."""
    if pre == "gpt-2":
        return train_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return train_tokenizer(
            pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        )
    if pre == "qwen2":
        module = importlib.import_module("transformers.models.qwen2.tokenization_qwen2")
        tokenizer = train_tokenizer(split_then_bytes(module.PRETOKENIZE_REGEX))
        tokenizer.normalizer = normalizers.NFC()
        return tokenizer
    converter = importlib.import_module("transformers.convert_slow_tokenizer").TikTokenConverter
    tokenizer = train_tokenizer(split_then_bytes(inspect.signature(converter).parameters["pattern"].default))
    tokenizer.model.ignore_merges = True
    return tokenizer


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_ids_equal_those_of_the_original(build_gguf: BuildGguf, tmp_path: Path, pre: str) -> None:
    reference = reference_tokenizer(pre)
    converted = convert(build_gguf(pre=pre, tokenizer=reference), tmp_path / "out")

    @settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
    @given(st.text() | st.text(alphabet="aF' é1½٣\n\r\t.,_漢"))
    def check(text: str) -> None:
        assert converted.encode(text, add_special_tokens=False).ids == reference.encode(text).ids

    check()
    for text in [*TEXTS, "a<|end|>b <|begin|>"]:
        assert converted.encode(text, add_special_tokens=False).ids == reference.encode(text).ids


@pytest.mark.usefixtures("reading_once")
def test_smollm2_ids_equal_those_of_transformers(smollm2_dir: Path, smollm2_gguf: Path) -> None:
    """transformers reads the vocabulary from the same file but takes every byte-level BPE for GPT-2's, which
    joins digits. SmolLM's pre-tokenizer keeps each apart, so the reference gets the text cut at digits."""
    transformers = pytest.importorskip("transformers", minversion="5")
    reference = transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    ours = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    ours_in_transformers = transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    special = "<|im_start|>user\nhi <|im_end|>\n<repo_name>x<file_sep><|endoftext|>"
    for text in [*TEXTS, special]:
        pieces = regex.split(r"(\p{N})", text)
        expected = [token_id for piece in pieces for token_id in reference(piece)["input_ids"]]
        assert ours.encode(text).ids == expected, text
        assert ours_in_transformers(text)["input_ids"] == expected, text
        assert ours.decode(expected, skip_special_tokens=False) == text
    assert ours.get_vocab(with_added_tokens=True) == reference.get_vocab()
    for field in ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template"):
        assert getattr(ours_in_transformers, field) == getattr(reference, field), field


@pytest.mark.parametrize(
    ("pre", "says", "expected"),
    [
        ("gpt-2", {}, []),
        ("llama-bpe", {}, [0]),
        ("llama-bpe", {"bos": False}, []),
        ("gpt-2", {"bos": True}, [0]),
        ("gpt-2", {"bos": True, "eos": True}, [0, 1]),
        ("gpt-2", {"eos": True}, [1]),
    ],
)
def test_begin_and_end_tokens_are_added_where_the_file_says_so(
    build_gguf: BuildGguf, tmp_path: Path, pre: str, says: dict[str, bool], expected: list[int]
) -> None:
    def say(writer: gguf.GGUFWriter) -> None:
        if "bos" in says:
            writer.add_add_bos_token(says["bos"])
        if "eos" in says:
            writer.add_add_eos_token(says["eos"])

    converted = convert(build_gguf(pre=pre, metadata=say), tmp_path / "out")
    text_ids = converted.encode("fox", add_special_tokens=False).ids
    ids = converted.encode("fox").ids
    assert [token_id for token_id in ids if token_id in (0, 1)] == expected
    assert [token_id for token_id in ids if token_id not in (0, 1)] == text_ids
    if 0 in expected:
        assert ids[0] == 0


def test_the_chat_template_and_token_names_are_kept(build_gguf: BuildGguf, tmp_path: Path) -> None:
    convert(build_gguf(metadata=lambda writer: writer.add_chat_template("{{ messages }}")), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ messages }}"
    assert (config["bos_token"], config["eos_token"]) == ("<|begin|>", "<|end|>")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("tokenizer.ggml.merges", ["a b c"], "does not name two tokens"),
        ("tokenizer.ggml.token_type", [1], "with 1 types"),
        ("tokenizer.ggml.tokens", ["a", "a"], "'a' is in the vocabulary twice"),
        ("tokenizer.ggml.tokens", [1, 2], "must be a list of strings"),
        ("tokenizer.ggml.tokens", "a", "must be a list"),
    ],
)
def test_contradictory_metadata_is_refused(
    build_gguf: BuildGguf, tmp_path: Path, key: str, value: Any, said: str
) -> None:
    read = read_gguf(build_gguf())
    read.metadata[key] = value
    if said.endswith("twice"):
        read.metadata["tokenizer.ggml.token_type"] = [1, 1]
    with pytest.raises(ConfigError, match=said):
        write_tokenizer(read, tmp_path, 128)
