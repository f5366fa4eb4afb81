"""What each token id stands for, read once from a tokenizer's vocabulary and decoder."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from frontend.text.detokenizer import (
    ByteLevelDetokenizer,
    IncrementalDetokenizer,
    Piece,
    SentencePieceDetokenizer,
)
from pagewire.errors import ConfigError

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class ByteLevelTable:
    """Tokens of a byte-level BPE.

    Attributes:
        token_bytes: by id; empty where an id has no token.
        shown_bytes: the same without the special tokens.
    """

    token_bytes: list[bytes]
    shown_bytes: list[bytes]

    def new_detokenizer(self, *, skip_special_tokens: bool) -> IncrementalDetokenizer:
        return ByteLevelDetokenizer(self.shown_bytes if skip_special_tokens else self.token_bytes)


@dataclass(frozen=True, slots=True)
class SentencePieceTable:
    """Tokens of a SentencePiece-style tokenizer.

    Attributes:
        token_bytes: by id; empty where an id has no token.
        pieces: by id; None where an id has no token.
        shown_pieces: the same without the special tokens.
        first_pieces, first_shown_pieces: the same for the first token of a text.
        strip_spaces: leading spaces of a text that do not belong to it.
    """

    token_bytes: list[bytes]
    pieces: list[Piece]
    shown_pieces: list[Piece]
    first_pieces: list[Piece]
    first_shown_pieces: list[Piece]
    strip_spaces: int

    def new_detokenizer(self, *, skip_special_tokens: bool) -> IncrementalDetokenizer:
        return SentencePieceDetokenizer(
            self.shown_pieces if skip_special_tokens else self.pieces,
            first_pieces=self.first_shown_pieces if skip_special_tokens else self.first_pieces,
            strip_spaces=self.strip_spaces,
        )


TokenTable = ByteLevelTable | SentencePieceTable


def build_token_table(tokenizer: Tokenizer, special_ids: frozenset[int]) -> TokenTable:
    """The table of a tokenizer, by the kind of its decoder.

    Raises:
        ConfigError: the decoder is neither byte-level nor SentencePiece-style.
    """
    tokens = _tokens_by_id(tokenizer)
    decoder = _decoder_settings(tokenizer)
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        token_bytes = [b"" if token is None else _byte_level_bytes(token) for token in tokens]
        shown = [b"" if token_id in special_ids else data for token_id, data in enumerate(token_bytes)]
        return ByteLevelTable(token_bytes, shown)
    return _sentencepiece_table(tokens, special_ids, _SentencePieceRules.parse(steps))


def _tokens_by_id(tokenizer: Tokenizer) -> list[str | None]:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokens: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        tokens[token_id] = token
    return tokens


def _decoder_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    if tokenizer.decoder is None:
        return {"type": "no decoder"}
    settings: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    return settings


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, every other byte for a letter from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(0x100 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | letters


_BYTE_OF_CHARACTER = _byte_of_character()


def _byte_level_bytes(token: str) -> bytes:
    """An added token may hold characters outside the alphabet; then it is plain text."""
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode("utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class _SentencePieceRules:
    """What the steps of a SentencePiece-style decoder do to a token.

    Attributes:
        space: the character written for a space, if one is.
        byte_fallback: whether <0x41> means the byte 0x41.
        strip_spaces: leading spaces removed from the whole text.
        drop_first_space: whether the first token loses its spaces.
    """

    space: str | None = None
    byte_fallback: bool = False
    strip_spaces: int = 0
    drop_first_space: bool = False

    @classmethod
    def parse(cls, steps: list[dict[str, Any]]) -> _SentencePieceRules:
        """Understands Metaspace alone, and Replace, ByteFallback, Fuse, Strip in this order."""
        match steps:
            case [{"type": "Metaspace", "replacement": str(space), "prepend_scheme": str(scheme)}]:
                return cls(space=space, drop_first_space=scheme != "never")
        rest = list(steps)
        rules: dict[str, Any] = {}
        match rest:
            case [{"type": "Replace", "pattern": {"String": str(space)}, "content": " "}, *_]:
                rules["space"] = space
                del rest[0]
        if rest and rest[0]["type"] == "ByteFallback":
            rules["byte_fallback"] = True
            del rest[0]
        match rest:
            case [] | [{"type": "Fuse"}] if rules:
                return cls(**rules)
            case [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": int(start), "stop": 0}]:
                return cls(**rules, strip_spaces=start)
        raise ConfigError(
            f"the tokenizer's decoder is {' + '.join(step['type'] for step in steps)}; ByteLevel, Metaspace, "
            "and Replace + ByteFallback + Fuse + Strip can be streamed"
        )

    def piece(self, token: str, *, first: bool) -> Piece:
        if self.byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return int(byte[1], 16)
        if self.space is None:
            return token
        return token.replace(self.space, "" if first and self.drop_first_space else " ")


def _sentencepiece_table(
    tokens: list[str | None], special_ids: frozenset[int], rules: _SentencePieceRules
) -> SentencePieceTable:
    def pieces(*, first: bool) -> list[Piece]:
        return [None if token is None else rules.piece(token, first=first) for token in tokens]

    def shown(every: list[Piece]) -> list[Piece]:
        return [None if token_id in special_ids else piece for token_id, piece in enumerate(every)]

    inner = pieces(first=False)
    first = pieces(first=True) if rules.drop_first_space else inner
    return SentencePieceTable(
        token_bytes=[_piece_bytes(piece) for piece in inner],
        pieces=inner,
        shown_pieces=shown(inner),
        first_pieces=first,
        first_shown_pieces=shown(first),
        strip_spaces=rules.strip_spaces,
    )


def _piece_bytes(piece: Piece) -> bytes:
    if piece is None:
        return b""
    return bytes([piece]) if isinstance(piece, int) else piece.encode("utf-8")
