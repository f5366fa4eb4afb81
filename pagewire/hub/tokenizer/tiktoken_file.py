"""tiktoken vocabularies as tokenizer.json.

Such a file has a line for each token: its bytes in base64, and its rank, which is its id. tiktoken joins the
neighbours whose bytes have the lowest rank, which is a byte pair encoding.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pagewire.base.errors import ConfigError
from pagewire.hub.model_files import MAX_TOKENIZER_BYTES, read_bytes
from pagewire.hub.tokenizer.byte_level import MAX_TOKEN_ID, byte_level_token
from pagewire.hub.tokenizer.document import (
    BYTE_LEVEL,
    GPT2,
    MAX_TOKEN_LENGTH,
    AddedToken,
    bpe_model,
    sequence,
    split,
    surrounding,
    tokenizer_document,
)

_RANK_DIGITS = 7


def is_tiktoken(path: Path) -> bool:
    """Whether a file's first line is one of such a file's. Raises ConfigError if it cannot be read."""
    first, _, _ = read_bytes(path, MAX_TOKENIZER_BYTES)[:4096].partition(b"\n")
    try:
        _line(first)
    except ValueError:
        return False
    return True


def tiktoken_ranks(path: Path) -> dict[bytes, int]:
    """The rank of each token.

    Raises:
        ConfigError: it is no tiktoken file.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path, MAX_TOKENIZER_BYTES).splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = _line(line)
        except ValueError as error:
            raise ConfigError(f"{path}: line {number} is no token in base64 with its rank") from error
        ranks[token] = rank
    if not ranks or len(set(ranks.values())) != len(ranks):
        raise ConfigError(f"{path}: two tokens have one rank, or there is none")
    return ranks


def tiktoken_document(
    ranks: dict[bytes, int],
    pattern: str,
    *,
    added: Sequence[AddedToken],
    before: Sequence[tuple[str, int]] = (),
    nfc: bool = False,
) -> dict[str, Any]:
    """A tokenizer.json that encodes as tiktoken does.

    Args:
        pattern: the regular expression that splits a text into words.
        before: tokens to put before every text, with their ids.
        nfc: whether texts are brought into Unicode's composed form first.
    """
    written = {token: byte_level_token(token) for token in ranks}
    vocab = {written[token]: rank for token, rank in ranks.items()}
    merges = [
        (written[token[:cut]], written[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    return tokenizer_document(
        bpe_model(vocab | {token.content: token.id for token in added}, merges, ignore_merges=True),
        added=added,
        normalizer={"type": "NFC"} if nfc else None,
        pre_tokenizer=sequence("pretokenizers", [split(pattern), BYTE_LEVEL]),
        post_processor=surrounding(before, ()),
        decoder=GPT2,
    )


def _line(line: bytes) -> tuple[bytes, int]:
    """Raises ValueError."""
    token, separator, rank = line.strip().partition(b" ")
    if not separator or not rank.isdigit():
        raise ValueError("no rank")
    try:
        data = base64.b64decode(token, validate=True)
    except binascii.Error as error:
        raise ValueError("no base64") from error
    if not 1 <= len(data) <= MAX_TOKEN_LENGTH or len(rank) > _RANK_DIGITS or int(rank) > MAX_TOKEN_ID:
        raise ValueError("no token")
    return data, int(rank)
