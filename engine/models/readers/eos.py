"""Which tokens end a completion, as a checkpoint's files say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagewire.base.errors import ConfigError

MAX_EOS_TOKEN_IDS = 256


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
