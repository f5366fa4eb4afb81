"""What each token id stands for, read once from a tokenizer's vocabulary and decoder."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer

from frontend.text.detokenizer import (
    ByteLevelDetokenizer,
    IncrementalDetokenizer,
    SentencePieceDetokenizer,
)
from pagewire.hub.tokenizer.byte_level import byte_level_bytes
from pagewire.hub.tokenizer.token_pieces import (
    Piece,
    SentencePieceRules,
    decoder_rules,
    piece_bytes,
    tokens_by_id,
)


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
    tokens = tokens_by_id(tokenizer)
    rules = decoder_rules(tokenizer)
    if rules is None:
        token_bytes = [b"" if token is None else byte_level_bytes(token) for token in tokens]
        shown = [b"" if token_id in special_ids else data for token_id, data in enumerate(token_bytes)]
        return ByteLevelTable(token_bytes, shown)
    return _sentencepiece_table(tokens, special_ids, rules)


def _sentencepiece_table(
    tokens: list[str | None], special_ids: frozenset[int], rules: SentencePieceRules
) -> SentencePieceTable:
    def pieces(*, first: bool) -> list[Piece]:
        return [None if token is None else rules.piece(token, first=first) for token in tokens]

    def shown(every: list[Piece]) -> list[Piece]:
        return [None if token_id in special_ids else piece for token_id, piece in enumerate(every)]

    inner = pieces(first=False)
    first = pieces(first=True) if rules.drop_first_space else inner
    return SentencePieceTable(
        token_bytes=[piece_bytes(piece) for piece in inner],
        pieces=inner,
        shown_pieces=shown(inner),
        first_pieces=first,
        first_shown_pieces=shown(first),
        strip_spaces=rules.strip_spaces,
    )
