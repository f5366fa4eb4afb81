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
from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from frontend.text.tokenizer import TextTokenizer
from pagewire.base.errors import ConfigError
from pagewire.hub.gguf.reader import GgufFile, read_gguf
from pagewire.hub.gguf.tokenizer import write_tokenizer
from pagewire.hub.tokenizer.sentencepiece_file import read_sentencepiece
from tests.unit.hub.conftest import BuildGguf, train_tokenizer
from tests.unit.hub.sentencepiece_models import texts, train

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

# The patterns of the families' own tokenizer.json.
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PUBLISHED = {
    "gpt-4o": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "tekken": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "dbrx": GPT4,
    "chatglm-bpe": GPT4,
}


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
    if pre in PUBLISHED:
        tokenizer = train_tokenizer(split_then_bytes(PUBLISHED[pre]))
        tokenizer.model.ignore_merges = True
        return tokenizer
    if pre == "qwen2":
        module = importlib.import_module("transformers.models.qwen2.tokenization_qwen2")
        tokenizer = train_tokenizer(split_then_bytes(module.PRETOKENIZE_REGEX))
        tokenizer.normalizer = normalizers.NFC()
        return tokenizer
    converter = importlib.import_module("transformers.convert_slow_tokenizer").TikTokenConverter
    tokenizer = train_tokenizer(split_then_bytes(inspect.signature(converter).parameters["pattern"].default))
    tokenizer.model.ignore_merges = True
    return tokenizer


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", *PUBLISHED])
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


def of_pieces(path: Path, model: bytes, **more: Any) -> GgufFile:
    """A GGUF file whose vocabulary is a SentencePiece model's, as llama.cpp's converter writes it."""
    (path.parent / "tokenizer.model").write_bytes(model)
    pieces = read_sentencepiece(path.parent / "tokenizer.model")
    read = read_gguf(path)
    read.metadata.update(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": list(pieces.pieces),
            "tokenizer.ggml.scores": list(pieces.scores),
            "tokenizer.ggml.token_type": list(pieces.types),
            "tokenizer.ggml.bos_token_id": 1,
            **more,
        }
    )
    return read


@pytest.mark.parametrize("settings", [{}, {"add_dummy_prefix": False, "symbols": ("<tool>", "\t")}])
def test_vocabularies_of_sentencepiece_give_the_ids_of_its_library(
    build_gguf: BuildGguf, tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = train("bpe", **settings)
    prefixed = {"tokenizer.ggml.add_space_prefix": settings.get("add_dummy_prefix", True)}
    write_tokenizer(of_pieces(build_gguf(), model, **prefixed), tmp_path, 128)
    library, converted = SentencePieceProcessor(model_proto=model), TextTokenizer.load(tmp_path)
    for text in texts(settings.get("symbols", ())):
        if "<s>" not in text:
            expected = library.encode(text)
            assert converted.encode(text) == [1, *expected], text
            assert converted.decode(expected, skip_special_tokens=True) == library.decode(expected)


def test_phi3s_control_tokens_take_the_white_space_behind_them(build_gguf: BuildGguf, tmp_path: Path) -> None:
    model = train("bpe", control_symbols=("<|user|>",))
    library = SentencePieceProcessor(model_proto=model)
    phi3 = of_pieces(build_gguf(), model, **{"general.architecture": "phi3"})
    write_tokenizer(phi3, tmp_path, 128)
    ids = TextTokenizer.load(tmp_path).encode("<|user|>\n fox<s>\n")
    assert ids == [1, library.piece_to_id("<|user|>"), *library.encode("fox"), 1, *library.encode("\n")]


def test_vocabularies_of_sentencepiece_say_whether_texts_begin_with_bos(
    build_gguf: BuildGguf, tmp_path: Path
) -> None:
    says = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    write_tokenizer(of_pieces(build_gguf(), train("bpe"), **says), tmp_path, 128)
    ids = TextTokenizer.load(tmp_path).encode("fox")
    assert (ids[0] == 1, ids[-1]) == (False, 1)  # the file's eos is 1


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("tokenizer.ggml.model", "bert", "model 'bert'; byte-level BPE .'gpt2'. and SentencePiece .'llama'."),
        ("tokenizer.ggml.model", "t5", "model 't5'"),
        ("tokenizer.ggml.scores", [0.0], "with 1 scores"),
        ("tokenizer.ggml.token_type", [1], "with 1 types"),
        ("tokenizer.ggml.bos_token_id", 9999, "bos_token_id is 9999"),
        ("tokenizer.ggml.tokens", ["a"] * 420, "'a' is in the vocabulary twice"),
    ],
)
def test_vocabularies_that_cannot_be_converted_are_refused(
    build_gguf: BuildGguf, tmp_path: Path, key: str, value: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        write_tokenizer(of_pieces(build_gguf(), train("bpe"), **{key: value}), tmp_path, 128)
    assert "tiny.gguf" in raised.value.message


def test_an_unknown_pre_tokenizer_is_refused_with_those_that_are_known(
    build_gguf: BuildGguf, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"pre-tokenizer 'viking'; these can be converted: gpt-2, .*tekken"):
        write_tokenizer(read_gguf(build_gguf(pre="viking")), tmp_path, 128)


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
