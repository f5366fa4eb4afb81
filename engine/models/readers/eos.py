"""Which tokens end a completion, as a checkpoint's files say."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagewire.base.errors import ConfigError
from pagewire.hub.model_files import MAX_TOKENIZER_BYTES, read_bytes, read_json_object
from pagewire.hub.tokenizer.files import has_tokenizer, tokenizer_file

MAX_EOS_TOKEN_IDS = 256
_TURN_ENDS: Mapping[str, tuple[str, ...]] = {
    "chatglm": ("<|user|>", "<|observation|>"),
    "qwen": ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
}
_ADDED_TOKENS = re.compile(r'"added_tokens"\s*:\s*(?=\[)')


def read_eos_token_ids(files: Mapping[str, Mapping[str, Any]], vocab_size: int) -> tuple[int, ...]:
    """Every end-of-sequence id that any of the files names; each may give one id, a list or null."""
    token_ids: dict[int, None] = {}
    for source, values in files.items():
        entry = values.get("eos_token_id")
        for token_id in entry if isinstance(entry, list) else [entry]:
            if token_id is None:
                continue
            is_integer = isinstance(token_id, int) and not isinstance(token_id, bool)
            if not is_integer or not 0 <= token_id < vocab_size:
                raise ConfigError(f"{source}: eos_token_id {token_id!r} is not a token id below {vocab_size}")
            token_ids[token_id] = None
        if len(token_ids) > MAX_EOS_TOKEN_IDS:
            raise ConfigError(f"{source}: eos_token_id names more than {MAX_EOS_TOKEN_IDS} tokens")
    return tuple(token_ids)


def tokenizer_eos_token_id(directory: Path) -> int | None:
    """The id of the `eos_token` of tokenizer_config.json, which for many fine-tunes is the only place that
    names the end of a turn. None where there is no such file, token or id.

    Raises:
        ConfigError: the tokenizer's files are malformed.
    """
    settings = directory / "tokenizer_config.json"
    if not settings.is_file() or not has_tokenizer(directory):
        return None
    token = read_json_object(settings).get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    return _token_id(tokenizer_file(directory), token) if isinstance(token, str) else None


def turn_end_token_ids(directory: Path, model_type: str) -> tuple[int, ...]:
    """The ids of the tokens that end a turn in families whose own code knows them, and no file of theirs.
    Empty for other families, and where there is no tokenizer.

    Args:
        model_type: as config.json has it.

    Raises:
        ConfigError: the tokenizer's files are malformed.
    """
    if model_type not in _TURN_ENDS or not has_tokenizer(directory):
        return ()
    path = tokenizer_file(directory)
    token_ids = (_token_id(path, token) for token in _TURN_ENDS[model_type])
    return tuple(token_id for token_id in token_ids if token_id is not None)


def _token_id(path: Path, token: str) -> int | None:
    """The id that a tokenizer.json gives to a token, read without the tokenizers library."""
    token_id = _find_added(_added_tokens_first(path), token)
    if token_id is None:
        content = read_json_object(path, MAX_TOKENIZER_BYTES)
        token_id = _find_added(content.get("added_tokens"), token)
        model = content.get("model")
        if token_id is None and isinstance(model, dict):
            token_id = _find_in_vocabulary(model.get("vocab"), token)
    is_integer = isinstance(token_id, int) and not isinstance(token_id, bool)
    return token_id if is_integer else None


def _added_tokens_first(path: Path) -> Any:
    """The list of added tokens, which the library writes before the vocabulary: reading no further takes
    milliseconds, and the whole file up to a second. None where it is not so."""
    try:
        text = read_bytes(path, MAX_TOKENIZER_BYTES).decode("utf-8")
        found = _ADDED_TOKENS.search(text)
        return json.JSONDecoder().raw_decode(text, found.end())[0] if found else None
    except (ValueError, RecursionError):  # the whole file is then refused by name
        return None


def _find_added(entries: Any, token: str) -> Any:
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and entry.get("content") == token:
            return entry.get("id")
    return None


def _find_in_vocabulary(vocabulary: Any, token: str) -> Any:
    """A vocabulary is an object of ids, or, of a Unigram model, a list of tokens with their scores."""
    if isinstance(vocabulary, dict):
        return vocabulary.get(token)
    for token_id, entry in enumerate(vocabulary if isinstance(vocabulary, list) else ()):
        if isinstance(entry, list) and entry and entry[0] == token:
            return token_id
    return None
