"""Token ids to text, a few ids at a time, without ever splitting a character.

Whatever the pushes, their concatenation with the flush equals the tokenizer's own decode of all the ids.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Protocol

from pagewire.hub.tokenizer.token_pieces import Piece

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class IncrementalDetokenizer(Protocol):
    """The text of one output. Not thread-safe. Ids beyond the vocabulary have no text."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes the next ids and returns the text that is now certain."""

    def flush(self) -> str:
        """The text held back so far; replacement characters stand for an incomplete character."""


class ByteLevelDetokenizer:
    """For byte-level BPE, where the text is the tokens' bytes, one after another, as UTF-8."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        """Takes the bytes of each id; empty for a token that is not to be shown."""
        self._token_bytes = token_bytes
        self._incomplete = b""

    def push(self, token_ids: Sequence[int]) -> str:
        table = self._token_bytes
        try:
            if len(token_ids) == 1:
                joined = table[token_ids[0]]
            else:
                joined = b"".join([table[token_id] for token_id in token_ids])
        except IndexError:  # the model's vocabulary is padded beyond the tokenizer's
            joined = b"".join([table[token_id] for token_id in token_ids if token_id < len(table)])
        if self._incomplete:
            joined = self._incomplete + joined
        text, num_used = utf_8_decode(joined, "replace", False)
        self._incomplete = joined[num_used:]
        return text

    def flush(self) -> str:
        text, _ = utf_8_decode(self._incomplete, "replace", True)
        self._incomplete = b""
        return text


class SentencePieceDetokenizer:
    """For SentencePiece-style tokenizers: tokens of text, and tokens of one byte for what has no token.

    A run of byte tokens is text if all of it is valid UTF-8; else each of its bytes is a replacement
    character. That is the tokenizers library's rule, so a run is held back until it ends.
    """

    def __init__(self, pieces: Sequence[Piece], *, strip_spaces: int, first_pieces: Sequence[Piece]) -> None:
        """
        Args:
            pieces: by token id.
            strip_spaces: how many leading spaces of the text to leave out.
            first_pieces: by token id, for the first token that is shown.
        """
        self._pieces = pieces
        self._first_pieces = first_pieces
        self._spaces_to_strip = strip_spaces
        self._at_start = True
        self._byte_run = bytearray()

    def push(self, token_ids: Sequence[int]) -> str:
        released: list[str] = []
        for token_id in token_ids:
            table = self._first_pieces if self._at_start else self._pieces
            piece = table[token_id] if token_id < len(table) else None
            if piece is None:
                continue
            self._at_start = False
            if isinstance(piece, int):
                self._byte_run.append(piece)
                continue
            if self._byte_run:
                released.append(self._end_byte_run())
            released.append(piece)
        return self._strip("".join(released))

    def flush(self) -> str:
        return self._strip(self._end_byte_run())

    def _end_byte_run(self) -> str:
        try:
            text = self._byte_run.decode("utf-8")
        except UnicodeDecodeError:
            text = _REPLACEMENT * len(self._byte_run)
        self._byte_run.clear()
        return text

    def _strip(self, text: str) -> str:
        if self._spaces_to_strip == 0 or not text:
            return text
        stripped = text.lstrip(" ")
        leading = len(text) - len(stripped)
        removed = min(leading, self._spaces_to_strip)
        self._spaces_to_strip = 0 if stripped else self._spaces_to_strip - removed
        return text[removed:]
