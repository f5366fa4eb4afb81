"""A model's tokenizer, as its tokenizer.json says."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Encoding, Tokenizer
from tokenizers.models import BPE

from frontend.text.detokenizer import IncrementalDetokenizer
from frontend.text.token_table import ByteLevelTable, TokenTable, build_token_table
from pagewire.base.errors import ConfigError, InvalidRequest
from pagewire.hub.tokenizer.files import TOKENIZER_FILE
from pagewire.hub.tokenizer.token_pieces import no_panics, read_tokenizer, special_token_ids


@dataclass(frozen=True, slots=True)
class TextTokenizer:
    """Text to ids and ids to text. Immutable and thread-safe; encoding and decoding release the GIL.

    Attributes:
        vocab_size: one more than the highest id that has a token. The model's own may be larger.
        special_ids: control tokens such as the end of a turn, which are not text.
        longest_token: the most bytes of text that one token stands for.
    """

    vocab_size: int
    special_ids: frozenset[int]
    longest_token: int
    _tokenizer: Tokenizer
    _table: TokenTable

    @classmethod
    def load(cls, model_dir: Path) -> TextTokenizer:
        """Reads a model directory's tokenizer, converting it if it is no tokenizer.json.

        Raises:
            ConfigError: it is missing, wrong, or of a kind whose output cannot be streamed.
        """
        tokenizer = read_tokenizer(model_dir)
        special_ids = special_token_ids(tokenizer)
        try:
            table = build_token_table(tokenizer, special_ids)
        except ConfigError as error:
            own = model_dir / TOKENIZER_FILE
            raise ConfigError(f"{own if own.is_file() else model_dir}: {error.message}") from error
        longest_token = max(map(len, table.token_bytes), default=1)
        return cls(len(table.token_bytes), special_ids, longest_token, tokenizer, table)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text. Special tokens written in the text become their ids.

        Args:
            add_special_tokens: whether to add what the model expects around a text, such as the
                beginning-of-sequence token; the tokenizer says what that is, often nothing.

        Raises:
            InvalidRequest: the text is not valid Unicode.
        """
        ids: list[int] = self._encode(text, add_special_tokens).ids
        return ids

    def encode_marked(self, text: str, *, add_special_tokens: bool) -> tuple[list[int], list[int]]:
        """The ids of a text, and for each whether it was added (1) instead of written (0). See `encode`."""
        encoding = self._encode(text, add_special_tokens)
        return encoding.ids, encoding.special_tokens_mask

    def with_controls_as_text(self) -> TextTokenizer:
        """The same, but tokens that are found in a text before it is split are text like any other, control
        tokens above all. Takes about as long as reading it did."""
        document = json.loads(self._tokenizer.to_str())
        for token in document["added_tokens"]:
            token["special"] = token["special"] or not token["normalized"]
        tokenizer = Tokenizer.from_str(json.dumps(document))
        tokenizer.encode_special_tokens = True
        return replace(self, _tokenizer=tokenizer)

    def token_id(self, entry: str) -> int | None:
        """The token that the vocabulary spells so; None if there is none."""
        token_id: int | None = self._tokenizer.token_to_id(entry)
        return token_id

    def encode_pair_marked(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """The same of two texts as one input, with what the tokenizer puts around and between them."""
        encoding = self._encode(first, True, second)
        return encoding.ids, encoding.special_tokens_mask

    def _encode(self, text: str, add_special_tokens: bool, pair: str | None = None) -> Encoding:
        with no_panics(
            lambda reason: InvalidRequest(f"the model's tokenizer cannot read the text: {reason}")
        ):
            try:
                return self._tokenizer.encode(text, pair, add_special_tokens=add_special_tokens)
            except TypeError:  # how the library says that a string is not UTF-8
                pass
        raise InvalidRequest("the text has half a surrogate pair; it must be valid Unicode")

    @classmethod
    def without_text(cls) -> TextTokenizer:
        """For a model that has no tokenizer: token ids go in and out, and no text."""
        return _IdsOnly(0, frozenset(), 1, Tokenizer(BPE()), ByteLevelTable([], []))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of some ids.

        Raises:
            InvalidRequest: an id has no token.
        """
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequest(
                    f"token id {token_id} does not exist; ids are between 0 and {self.vocab_size - 1}",
                    param="token_ids",
                )
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text, special or not; empty for an id without a token."""
        return self._table.token_bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_text(self, token_id: int) -> str:
        """The token's bytes as text, with replacement characters where they are part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def vocabulary_entry(self, token_id: int) -> str | None:
        """A token as the vocabulary has it, such as "Ġthe" for " the"; None for an id without a token."""
        entry: str | None = self._tokenizer.id_to_token(token_id)
        return entry

    @property
    def special_tokens(self) -> dict[str, int]:
        """The control tokens' ids, by their texts."""
        return {self.token_text(token_id): token_id for token_id in self.special_ids}

    def showing(self, tokens: Collection[str]) -> TextTokenizer:
        """The same, but with some control tokens being text like any other."""
        hidden = frozenset(
            token_id for token_id in self.special_ids if self.token_text(token_id) not in tokens
        )
        if hidden == self.special_ids:
            return self
        return replace(self, special_ids=hidden, _table=build_token_table(self._tokenizer, hidden))

    def new_detokenizer(self, *, skip_special_tokens: bool) -> IncrementalDetokenizer:
        """For the ids of one output, as they come."""
        return self._table.new_detokenizer(skip_special_tokens=skip_special_tokens)


class _IdsOnly(TextTokenizer):
    """Has no vocabulary; see `TextTokenizer.without_text`."""

    __slots__ = ()

    def _encode(self, text: str, add_special_tokens: bool, pair: str | None = None) -> Encoding:
        raise InvalidRequest("this model has no tokenizer; send token ids instead of text", param="prompt")
