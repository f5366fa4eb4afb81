"""tokenizer.json and tokenizer_config.json from the metadata of a GGUF file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pagewire.base.errors import ConfigError
from pagewire.hub.gguf.reader import GgufFile
from pagewire.hub.tokenizer.document import (
    GPT2,
    AddedToken,
    bpe_model,
    sequence,
    surrounding,
    tokenizer_document,
    write_document,
)
from pagewire.hub.tokenizer.piece_tokenizer import PieceType, PieceVocabulary, piece_document
from pagewire.hub.tokenizer.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from pagewire.hub.tokenizer.token_pieces import parse_tokenizer


def tokens(gguf: GgufFile) -> list[str]:
    """The vocabulary: the token of each id."""
    return _strings(gguf, "tokenizer.ggml.tokens")


def write_tokenizer(gguf: GgufFile, directory: Path, max_length: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    Raises:
        ConfigError: the tokenizer is neither a byte-level BPE with a known pre-tokenizer nor a SentencePiece
            model, or its parts contradict each other.
    """
    model = gguf.require("tokenizer.ggml.model", str)
    vocabulary = tokens(gguf)
    if model == "gpt2":
        document = _byte_level(gguf, vocabulary)
    elif model == "llama":
        document = _sentencepiece(gguf, vocabulary)
    else:
        raise ConfigError(
            f"{gguf.path}: tokenizer model '{model}'; byte-level BPE ('gpt2') and SentencePiece ('llama') "
            "can be converted; use the model's Hugging Face directory instead"
        )
    path = directory / "tokenizer.json"
    write_document(path, document)
    try:
        parse_tokenizer(path)
    except ConfigError as error:  # such as a merge of tokens that are not in the vocabulary
        raise ConfigError(f"{gguf.path}: its tokenizer cannot be converted: {error}") from error
    write_document(directory / "tokenizer_config.json", _tokenizer_config(gguf, vocabulary, max_length))


def _byte_level(gguf: GgufFile, vocabulary: list[str]) -> dict[str, Any]:
    pre = _pre_tokenizer(gguf)
    before, behind = _surrounding(gguf, vocabulary, add_bos=pre.adds_bos)
    added = surrounding(before, behind)
    return tokenizer_document(
        bpe_model(_vocab(gguf, vocabulary), _merges(gguf), ignore_merges=pre.whole_words),
        added=_added_tokens(gguf, vocabulary),
        normalizer={"type": "NFC"} if pre.nfc else None,
        pre_tokenizer=sequence("pretokenizers", pre.steps),
        post_processor=sequence("processors", [GPT2] if added is None else [GPT2, added]),
        decoder=GPT2,
    )


def _sentencepiece(gguf: GgufFile, vocabulary: list[str]) -> dict[str, Any]:
    types = _token_types(gguf, vocabulary)
    scores = gguf.require("tokenizer.ggml.scores", list)
    if len(scores) != len(vocabulary):
        raise ConfigError(f"{gguf.path}: {len(vocabulary)} tokens with {len(scores)} scores")
    before, behind = _surrounding(gguf, vocabulary, add_bos=True)
    pieces = PieceVocabulary(
        kind="bpe",
        pieces=vocabulary,
        scores=scores,
        types=types,
        byte_fallback=PieceType.BYTE in types,
        dummy_prefix=gguf.optional("tokenizer.ggml.add_space_prefix", bool, True),
        remove_extra_spaces=gguf.optional("tokenizer.ggml.remove_extra_whitespaces", bool, False),
    )
    added = _phi3_tokens(pieces) if gguf.optional("general.architecture", str, "") == "phi3" else []
    try:
        return piece_document(pieces, added=added, before=before, behind=behind)
    except ConfigError as error:
        raise ConfigError(f"{gguf.path}: {error.message}") from error


def _phi3_tokens(pieces: PieceVocabulary) -> list[AddedToken]:
    """Phi-3's control tokens take the white space behind them, which a GGUF file has no place for."""
    return [
        AddedToken(id=token_id, content=pieces.pieces[token_id], special=True, rstrip=True)
        for token_id in pieces.of_type(PieceType.CONTROL, PieceType.USER_DEFINED)
        if pieces.pieces[token_id] not in ("<s>", "<unk>", "<|endoftext|>")
    ]


def _pre_tokenizer(gguf: GgufFile) -> PreTokenizer:
    pre: str = gguf.optional("tokenizer.ggml.pre", str, "missing")
    if pre not in PRE_TOKENIZERS:
        raise ConfigError(
            f"{gguf.path}: pre-tokenizer '{pre}'; these can be converted: {', '.join(PRE_TOKENIZERS)}; "
            "use the model's Hugging Face directory instead"
        )
    return PRE_TOKENIZERS[pre]


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


def _token_types(gguf: GgufFile, vocabulary: list[str]) -> list[int]:
    types: list[int] = gguf.require("tokenizer.ggml.token_type", list)
    if len(types) != len(vocabulary):
        raise ConfigError(f"{gguf.path}: {len(vocabulary)} tokens with {len(types)} types")
    return types


def _added_tokens(gguf: GgufFile, vocabulary: list[str]) -> list[AddedToken]:
    """Tokens that are found in a text before anything splits it; the special ones are not shown."""
    special = (PieceType.CONTROL, PieceType.UNKNOWN)
    return [
        AddedToken(id=token_id, content=vocabulary[token_id], special=kind in special)
        for token_id, kind in enumerate(_token_types(gguf, vocabulary))
        if kind in special or kind == PieceType.USER_DEFINED
    ]


def _surrounding(
    gguf: GgufFile, vocabulary: list[str], *, add_bos: bool
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """The tokens before and behind every text, with their ids.

    Args:
        add_bos: whether texts begin with bos if the file does not say.
    """

    def wanted(name: str, by_default: bool) -> list[tuple[str, int]]:
        if not gguf.optional(f"tokenizer.ggml.add_{name}_token", bool, by_default):
            return []
        token_id = gguf.require(f"tokenizer.ggml.{name}_token_id", int)
        if not 0 <= token_id < len(vocabulary):
            raise ConfigError(
                f"{gguf.path}: tokenizer.ggml.{name}_token_id is {token_id}; there are {len(vocabulary)} "
                "tokens"
            )
        return [(vocabulary[token_id], token_id)]

    return wanted("bos", add_bos), wanted("eos", False)


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
