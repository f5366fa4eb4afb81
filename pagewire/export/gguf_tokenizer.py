"""A tokenizer as the keys of a GGUF file, checked by reading them back."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagewire.base.errors import ConfigError
from pagewire.hub.gguf.reader import GgufFile
from pagewire.hub.gguf.tokenizer import write_tokenizer
from pagewire.hub.model_files import read_json_object
from pagewire.hub.tokenizer.files import tokenizer_file
from pagewire.hub.tokenizer.piece_tokenizer import PieceType
from pagewire.hub.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from pagewire.hub.tokenizer.sentencepiece_file import read_sentencepiece
from pagewire.hub.tokenizer.token_pieces import parse_tokenizer, read_tokenizer

# Texts that split in many ways: what is read back must split them alike.
_PROBES = (
    "Hello, world! It's 12345 o'clock, isn't it?\n\n\tdef f(x):\n        return x**2  # 3.14\n",
    "Ünïcode: naïve café, 日本語のテキスト, русский, العربية, 🎉👩‍👩‍👧 e\u0301",
    "  two  spaces   and CamelCaseWords, snake_case_words, /path/to/file.txt, 1,000,000.00€",
    "",
)


def add_tokenizer(directory: Path, values: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The keys of a model's tokenizer.

    Raises:
        ConfigError: it is neither byte-level BPE with a known way to split words, nor has it a SentencePiece
            model of pairs; or what is read back tokenizes otherwise.
    """
    document = json.loads(tokenizer_file(directory).read_text(encoding="utf-8"))
    settings_file = directory / "tokenizer_config.json"
    settings = read_json_object(settings_file) if settings_file.is_file() else {}
    common = _ids(values, directory) | _template(directory, settings)
    if (directory / "tokenizer.model").is_file():
        candidates = [_pieces(directory, document, vocab_size)]
    else:
        candidates = _byte_level(directory, document, vocab_size)
    own = read_tokenizer(directory)
    begins = own.encode("a").ids[:1] == [common.get("tokenizer.ggml.bos_token_id")]
    for keys in candidates:
        made = {**common, **keys, "tokenizer.ggml.add_bos_token": begins}
        if _same(directory, made, own):
            return made
    raise ConfigError(
        f"{directory}: its tokenizer cannot be written as GGUF: none of the ways to split words that GGUF "
        "names splits as it does"
    )


def _byte_level(directory: Path, document: Mapping[str, Any], vocab_size: int) -> list[dict[str, Any]]:
    model = document["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ConfigError(
            f"{directory}: its tokenizer cannot be written as GGUF: it is no byte-level BPE, and has no "
            "tokenizer.model"
        )
    tokens, types = _tokens(model["vocab"], document, vocab_size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
    }
    return [{**keys, "tokenizer.ggml.pre": name} for name in PRE_TOKENIZERS]


def _pieces(directory: Path, document: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    found = read_sentencepiece(directory / "tokenizer.model")
    if found.kind != "bpe":
        raise ConfigError(f"{directory}: its tokenizer cannot be written as GGUF: it is a unigram model")
    vocab = {piece: number for number, piece in enumerate(found.pieces)}
    tokens, types = _tokens(vocab, document, vocab_size)
    for number, kind in enumerate(found.types):
        types[number] = int(kind)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [*found.scores, *([0.0] * (vocab_size - len(found.scores)))],
        "tokenizer.ggml.add_space_prefix": found.dummy_prefix,
        "tokenizer.ggml.remove_extra_whitespaces": found.remove_extra_spaces,
    }


def _tokens(
    vocab: Mapping[str, int], document: Mapping[str, Any], vocab_size: int
) -> tuple[list[str], list[int]]:
    """Every token of the model's vocabulary, and its type."""
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [int(PieceType.UNUSED)] * vocab_size
    for token, number in vocab.items():
        tokens[number], types[number] = token, int(PieceType.NORMAL)
    for added in document.get("added_tokens", ()):
        kind = PieceType.CONTROL if added["special"] else PieceType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    return tokens, types


def _ids(values: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    generation = directory / "generation_config.json"
    more = read_json_object(generation) if generation.is_file() else {}
    ids = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = values.get(f"{name}_token_id", more.get(f"{name}_token_id"))
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and not isinstance(value, bool):
            ids[f"tokenizer.ggml.{key}_token_id"] = value
    return ids


def _template(directory: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    file = directory / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    return {"tokenizer.chat_template": template} if isinstance(template, str) else {}


def _same(directory: Path, keys: Mapping[str, Any], own: Any) -> bool:
    with tempfile.TemporaryDirectory() as scratch:
        try:
            write_tokenizer(GgufFile(directory, dict(keys), {}), Path(scratch), 1)
        except ConfigError:
            return False
        read = parse_tokenizer(Path(scratch) / "tokenizer.json")
    return all(read.encode(text).ids == own.encode(text).ids for text in _PROBES)
