"""Byte-level vocabularies as tokenizer.json, from the two files that transformers' older tokenizers save:
vocab.json has the id of each token, and merges.txt a pair of tokens a line, best first.

Neither says how a text is split into words before pairs are joined. The name of the tokenizer's class does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pagewire.base.errors import ConfigError
from pagewire.hub.model_files import MAX_TOKENIZER_BYTES, read_bytes, read_json_object
from pagewire.hub.tokenizer.byte_level import MAX_TOKEN_ID
from pagewire.hub.tokenizer.document import GPT2, AddedToken, bpe_model, sequence, tokenizer_document
from pagewire.hub.tokenizer.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer

VOCABULARY, MERGES = "vocab.json", "merges.txt"
_VERSION = "#version"


def split_of(source: Path, tokenizer_class: str, model_type: str) -> PreTokenizer:
    """How a tokenizer splits texts.

    Raises:
        ConfigError: the files do not say it. GPT2Tokenizer says it only of GPT-2: Granite, OLMo, Phi-4 and
            SmolLM, whose texts are split in other ways, have that name too.
    """
    if tokenizer_class.removesuffix("Fast") == "Qwen2Tokenizer":
        return PRE_TOKENIZERS["qwen2"]
    if not tokenizer_class and model_type.startswith(("qwen2", "qwen3")):
        return PRE_TOKENIZERS["qwen2"]
    raise ConfigError(
        f"{source}: {VOCABULARY} and {MERGES} of {tokenizer_class or 'an unknown tokenizer'} do not say how "
        "texts are split; those of Qwen2Tokenizer are read, and others need a tokenizer.json"
    )


def read_vocabulary(path: Path) -> dict[str, int]:
    """The id of each token.

    Raises:
        ConfigError: it is no vocab.json.
    """
    vocab = read_json_object(path, MAX_TOKENIZER_BYTES)
    for token, token_id in vocab.items():
        if type(token_id) is not int or not 0 <= token_id <= MAX_TOKEN_ID:
            raise ConfigError(
                f"{path}: the token {token[:100]!r} has the id {str(token_id)[:100]!r}; an id is a number "
                f"between 0 and {MAX_TOKEN_ID}"
            )
    if not vocab or len(set(vocab.values())) != len(vocab):
        raise ConfigError(f"{path}: two tokens have one id, or there is none")
    return vocab


def read_merges(path: Path, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """The pairs that are joined, best first.

    Raises:
        ConfigError: it is no merges.txt, or one of another vocabulary.
    """
    try:
        lines = read_bytes(path, MAX_TOKENIZER_BYTES).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8") from error
    merges = []
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith(_VERSION)):
            continue
        left, _, right = line.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise ConfigError(f"{path}: line {number} is no pair of tokens that make a token of {VOCABULARY}")
        merges.append((left, right))
    return merges


def merges_document(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    pre_tokenizer: PreTokenizer,
    *,
    added: Sequence[AddedToken],
) -> dict[str, Any]:
    """A tokenizer.json of them."""
    return tokenizer_document(
        bpe_model(vocab, merges, ignore_merges=pre_tokenizer.whole_words),
        added=added,
        normalizer={"type": "NFC"} if pre_tokenizer.nfc else None,
        pre_tokenizer=sequence("pretokenizers", pre_tokenizer.steps),
        post_processor=None,
        decoder=GPT2,
    )
