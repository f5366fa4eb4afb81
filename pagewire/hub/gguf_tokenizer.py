"""tokenizer.json and tokenizer_config.json from the metadata of a GGUF file (byte-level BPE)."""

from __future__ import annotations

import json
from collections import Counter
from enum import IntEnum
from pathlib import Path
from typing import Any

from pagewire.base.errors import ConfigError
from pagewire.hub.gguf_reader import GgufFile
from pagewire.hub.token_pieces import read_tokenizer


class TokenType(IntEnum):
    """tokenizer.ggml.token_type, as the GGUF specification numbers it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2 = {**_BYTE_LEVEL, "use_regex": True}
# The published patterns of Llama 3 and Qwen 2; they differ in how many digits stay together.
_LLAMA3_PATTERN, _QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_GPT2],
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT2],
    "llama-bpe": [_split(_LLAMA3_PATTERN), _BYTE_LEVEL],
    "qwen2": [_split(_QWEN2_PATTERN), _BYTE_LEVEL],
}
_NORMALIZERS = {"qwen2": {"type": "NFC"}}


def tokens(gguf: GgufFile) -> list[str]:
    """The vocabulary: the token of each id."""
    return _strings(gguf, "tokenizer.ggml.tokens")


def write_tokenizer(gguf: GgufFile, directory: Path, max_length: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    Raises:
        ConfigError: the tokenizer is not a byte-level BPE with a known pre-tokenizer, or its parts
            contradict each other.
    """
    pre = _pre_tokenizer_name(gguf)
    vocabulary = tokens(gguf)
    added = _added_tokens(gguf, vocabulary)
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _NORMALIZERS.get(pre),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[pre]},
        "post_processor": _post_processor(gguf, vocabulary, pre),
        "decoder": _GPT2,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,  # nosec B105 # no password
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": _vocab(gguf, vocabulary),
            "merges": _merges(gguf),
        },
    }
    _write_json(directory / "tokenizer.json", document)
    try:
        read_tokenizer(directory)
    except ConfigError as error:  # such as a merge of tokens that are not in the vocabulary
        raise ConfigError(f"{gguf.path}: its tokenizer cannot be converted: {error}") from error
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(gguf, vocabulary, max_length))


def _pre_tokenizer_name(gguf: GgufFile) -> str:
    model = gguf.require("tokenizer.ggml.model", str)
    if model != "gpt2":
        raise ConfigError(
            f"{gguf.path}: tokenizer model '{model}'; only byte-level BPE ('gpt2') can be converted; "
            "use the model's Hugging Face directory instead"
        )
    pre: str = gguf.optional("tokenizer.ggml.pre", str, "missing")
    if pre not in _PRE_TOKENIZERS:
        raise ConfigError(
            f"{gguf.path}: pre-tokenizer '{pre}'; these can be converted: {', '.join(_PRE_TOKENIZERS)}; "
            "use the model's Hugging Face directory instead"
        )
    return pre


def _vocab(gguf: GgufFile, vocabulary: list[str]) -> dict[str, int]:
    vocab = {token: token_id for token_id, token in enumerate(vocabulary)}
    if len(vocab) != len(vocabulary):
        twice, _ = Counter(vocabulary).most_common(1)[0]
        raise ConfigError(f"{gguf.path}: the token {twice!r} is in the vocabulary twice")
    return vocab


def _merges(gguf: GgufFile) -> list[list[str]]:
    """Pairs to merge, best first. A token never holds a space: byte-level BPE writes it as Ġ."""
    merges = [merge.split(" ") for merge in _strings(gguf, "tokenizer.ggml.merges")]
    wrong = next((merge for merge in merges if len(merge) != 2), None)
    if wrong is not None:
        raise ConfigError(f"{gguf.path}: the merge {' '.join(wrong)!r} does not name two tokens")
    return merges


def _added_tokens(gguf: GgufFile, vocabulary: list[str]) -> list[dict[str, Any]]:
    """Tokens that are found in a text before anything splits it; the special ones are not shown."""
    types = gguf.require("tokenizer.ggml.token_type", list)
    if len(types) != len(vocabulary):
        raise ConfigError(f"{gguf.path}: {len(vocabulary)} tokens with {len(types)} types")
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    return [
        {
            "id": token_id,
            "content": vocabulary[token_id],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind in special,
        }
        for token_id, kind in enumerate(types)
        if kind in special or kind == TokenType.USER_DEFINED
    ]


def _post_processor(gguf: GgufFile, vocabulary: list[str], pre: str) -> dict[str, Any]:
    """Adds bos and eos where the file says so. Llama 3 files that do not say mean bos."""
    add_bos = gguf.optional("tokenizer.ggml.add_bos_token", bool, pre == "llama-bpe")
    add_eos = gguf.optional("tokenizer.ggml.add_eos_token", bool, False)
    if not add_bos and not add_eos:
        return dict(_GPT2)
    specials: dict[str, Any] = {}
    template: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    for name, wanted, position in (("bos", add_bos, 0), ("eos", add_eos, 2)):
        if not wanted:
            continue
        token_id = gguf.require(f"tokenizer.ggml.{name}_token_id", int)
        token = vocabulary[token_id]
        specials[token] = {"id": token, "ids": [token_id], "tokens": [token]}
        template.insert(position, {"SpecialToken": {"id": token, "type_id": 0}})
    second = {"Sequence": {"id": "B", "type_id": 1}}
    processor = {
        "type": "TemplateProcessing",
        "single": template,
        "pair": [*template, second],
        "special_tokens": specials,
    }
    return {"type": "Sequence", "processors": [_GPT2, processor]}


def _tokenizer_config(gguf: GgufFile, vocabulary: list[str], max_length: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = gguf.optional(f"tokenizer.ggml.{key}_token_id", int, None)
        if token_id is not None and 0 <= token_id < len(vocabulary):
            config[f"{name}_token"] = vocabulary[token_id]
    template = gguf.optional("tokenizer.chat_template", str, None)
    if template is not None:
        config["chat_template"] = template
    return config


def _strings(gguf: GgufFile, key: str) -> list[str]:
    values: list[str] = gguf.require(key, list)
    if not values or not isinstance(values[0], str):
        raise ConfigError(f"{gguf.path}: {key} must be a list of strings")
    return values


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
