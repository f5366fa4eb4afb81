"""SentencePiece models run as tokenizer.json with the ids and texts of the sentencepiece library."""

from __future__ import annotations

import json
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from frontend.text.tokenizer import TextTokenizer
from pagewire.base.errors import ConfigError
from pagewire.hub.tokenizer.files import tokenizer_file
from pagewire.hub.tokenizer.piece_tokenizer import piece_document
from pagewire.hub.tokenizer.sentencepiece_file import read_sentencepiece
from pagewire.hub.tokenizer.token_pieces import read_tokenizer
from tests.unit.hub.sentencepiece_models import CORPUS, texts, train

LLAMA: dict[str, Any] = {}
NO_PREFIX: dict[str, Any] = {
    "add_dummy_prefix": False,
    "symbols": ("<tool>", "▁▁", "▁▁▁", "\t"),
    "allow_whitespace_only_pieces": True,
}
SYMBOLS: dict[str, Any] = {"symbols": ("<tool>", "[x]"), "split_digits": True}
NFKC: dict[str, Any] = {"normalization_rule_name": "nfkc", "remove_extra_whitespaces": True}
NMT: dict[str, Any] = {
    "normalization_rule_name": "nmt_nfkc",
    "remove_extra_whitespaces": True,
    "byte_fallback": False,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEWIRE_HOME", str(tmp_path_factory.mktemp("home")))


def convert(model: bytes, directory: Path) -> Tokenizer:
    """With control pieces in texts being text, as they are to the sentencepiece library."""
    path = directory / "tokenizer.model"
    path.write_bytes(model)
    tokenizer = Tokenizer.from_str(json.dumps(piece_document(read_sentencepiece(path))))
    tokenizer.encode_special_tokens = True
    return tokenizer


def has_piled_marks(text: str) -> bool:
    """Whether several combining marks follow one another once a text is normalized."""
    marks = [unicodedata.combining(each) > 0 for each in unicodedata.normalize("NFKD", text)]
    return any(mark and following for mark, following in pairwise(marks))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("settings", [LLAMA, NO_PREFIX, SYMBOLS, NFKC, NMT], ids=lambda each: ",".join(each))
def test_ids_and_texts_equal_those_of_the_sentencepiece_library(
    tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    model = train(kind, **settings)
    converted, library = convert(model, tmp_path), SentencePieceProcessor(model_proto=model)
    symbols = settings.get("symbols", ())
    for text in texts(symbols):
        if "normalization_rule_name" in settings and has_piled_marks(text):
            continue  # the library does not sort them, as Unicode would
        if text in symbols and settings.get("add_dummy_prefix", True):
            continue  # a text that is one symbol and nothing else gets no dummy prefix
        expected = library.encode(text)
        ids = converted.encode(text, add_special_tokens=False).ids
        if ids != expected:  # two ways to split it are as good, and differ in how sums are rounded
            scores = [sum(map(library.get_score, each)) for each in (ids, expected)]
            assert kind == "unigram", text
            # Up to version 0.2.2, the library takes 0.1 off for each symbol of the user's.
            num_symbols = sum(library.id_to_piece(each) in symbols for each in (*ids, *expected))
            assert scores[0] == pytest.approx(scores[1], abs=1e-4 + 0.1 * num_symbols), text
        if library.unk_id() not in expected:
            assert converted.decode(expected, skip_special_tokens=False) == library.decode(expected)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_every_character_and_every_byte_comes_back(tmp_path: Path, kind: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train(kind))
    tokenizer = TextTokenizer.load(tmp_path)
    every = [chr(point) for point in range(0x3000) if point != 0x2581] + [chr(0x1F600), chr(0x10FFFF)]
    for begin in range(0, len(every), 64):
        text = "".join(every[begin : begin + 64])
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    spelled = [tokenizer.vocabulary_entry(token_id) for token_id in range(tokenizer.vocab_size)]
    for byte in range(256):
        assert tokenizer.token_bytes(spelled.index(f"<0x{byte:02X}>")) == bytes([byte])


@pytest.mark.parametrize("settings", [LLAMA, NO_PREFIX, NFKC], ids=lambda each: ",".join(each))
def test_text_that_comes_token_by_token_equals_the_whole(tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train("bpe", **settings))
    tokenizer = TextTokenizer.load(tmp_path)
    for text in [*CORPUS, *texts()[:200]]:
        ids = tokenizer.encode(text)
        detokenizer = tokenizer.new_detokenizer(skip_special_tokens=True)
        pieces = [detokenizer.push((token_id,)) for token_id in ids]
        assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_directory_is_left_as_it_is_and_converted_once_for_each_content(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train("bpe"))
    first = tokenizer_file(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]
    written = first.stat().st_mtime_ns
    assert tokenizer_file(tmp_path) == first
    assert first.stat().st_mtime_ns == written
    (tmp_path / "added_tokens.json").write_text('{"<extra>": 420}')
    assert tokenizer_file(tmp_path) != first
    own = tmp_path / "tokenizer.json"
    own.write_bytes(first.read_bytes())
    assert tokenizer_file(tmp_path) == own


def settings_files(directory: Path, **files: Any) -> TextTokenizer:
    (directory / "tokenizer.model").write_bytes(train("bpe"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return TextTokenizer.load(directory)


@pytest.mark.parametrize(
    ("config", "first", "last"),
    [
        ({}, 1, None),
        ({"add_bos_token": False}, None, None),
        ({"add_bos_token": True, "add_eos_token": True}, 1, 2),
        ({"bos_token": {"content": "</s>"}}, 2, None),
    ],
)
def test_texts_begin_and_end_as_the_settings_say(
    tmp_path: Path, config: dict[str, Any], first: int | None, last: int | None
) -> None:
    tokenizer = settings_files(tmp_path, tokenizer_config=config)
    text_ids = tokenizer.encode("fox", add_special_tokens=False)
    wanted = [*([] if first is None else [first]), *text_ids, *([] if last is None else [last])]
    assert tokenizer.encode("fox") == wanted


def test_added_tokens_of_every_file_have_their_ids(tmp_path: Path) -> None:
    tokenizer = settings_files(
        tmp_path,
        tokenizer_config={
            "added_tokens_decoder": {
                "422": {"content": "<|im_end|>", "special": True},
                "5": {"content": "<renamed>", "special": False},
            },
            "pad_token": "<pad>",
        },
        added_tokens={"<|im_start|>": 421},
        special_tokens_map={"additional_special_tokens": ["<|im_start|>"]},
    )
    ids = tokenizer.encode("a<|im_start|>b<|im_end|><pad><renamed>", add_special_tokens=False)
    assert [token_id for token_id in ids if token_id == 5 or token_id > 420] == [421, 422, 423, 5]
    assert {"<|im_start|>", "<|im_end|>", "<pad>", "<s>"} <= set(tokenizer.special_tokens)
    assert "<renamed>" not in tokenizer.special_tokens
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a b<renamed>"


def test_the_dummy_prefix_stands_behind_special_tokens_unless_the_settings_say_otherwise(
    tmp_path: Path,
) -> None:
    library = SentencePieceProcessor(model_proto=train("bpe"))
    text = "fox</s> fox</s>fox"
    tokenizer = settings_files(tmp_path)
    each = [*library.encode("fox"), 2, *library.encode(" fox"), 2, *library.encode("fox")]
    assert tokenizer.encode(text, add_special_tokens=False) == each
    tokenizer = settings_files(tmp_path, tokenizer_config={"legacy": False})
    behind = library.encode("x</s>fox")[len(library.encode("x</s>")) :]
    once = [*library.encode("fox"), 2, *library.encode("fox"), 2, *behind]
    assert tokenizer.encode(text, add_special_tokens=False) == once
    for leading in (" x", "  x", "\tx"):
        assert tokenizer.encode(leading, add_special_tokens=False) == library.encode(leading)


def test_chatglm_has_its_role_tokens_behind_the_model_and_begins_with_gmask_and_sop(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "chatglm"}')
    tokenizer = settings_files(tmp_path)
    size = SentencePieceProcessor(model_proto=train("bpe")).get_piece_size()
    names = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>"]
    ids = tokenizer.special_tokens
    assert [ids[name] for name in [*names, "<|observation|>"]] == list(range(size, size + 9))
    library = SentencePieceProcessor(model_proto=train("bpe"))
    assert tokenizer.encode("fox") == [size + 1, size + 3, *library.encode("fox")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.model", b"\x00\x01garbage", "not a SentencePiece model"),
        ("tokenizer.model", b"", "has no pieces"),
        ("tokenizer.model", train("bpe").replace(b"\xe2\x96\x81", b"\xff\xff\xff", 1), "not valid UTF-8"),
        ("added_tokens.json", b'{"<\\ud800>": 421}', "has half a surrogate pair"),
        ("added_tokens.json", b'{"<x>": "1"}', "has the id '1'"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}', "has the id 'x'"),
        ("added_tokens.json", b'{"<s>": 7}', "'<s>' is in the vocabulary twice"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train("bpe"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said) as raised:
        read_tokenizer(tmp_path)
    assert str(tmp_path) in raised.value.message


def test_models_of_words_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train("word", byte_fallback=False, vocab_size=30))
    with pytest.raises(ConfigError, match="unigram and bpe are read"):
        read_tokenizer(tmp_path)


def test_a_directory_without_a_tokenizer_says_which_files_are_read(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"tokenizer\.json, a SentencePiece model .* a tiktoken file .* or vocab\.json with"
    ):
        read_tokenizer(tmp_path)
