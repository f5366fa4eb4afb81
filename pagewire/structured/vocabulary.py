"""A model's tokens as the grammar engine wants them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from llguidance import LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer

from pagewire.base.errors import ConfigError
from pagewire.hub.tokenizer.token_pieces import no_panics, read_tokenizer, special_token_ids, token_bytes

# Encoded before a text whose tokens are wanted as they are in the midst of one.
_BEFORE = "\n"


class _Tokens:
    """What LLTokenizer asks of a tokenizer. The bytes are those that the detokenizer goes by, so that what a
    matcher accepts is what the client reads. (Where a tokenizer drops the space that begins a text, as Llama
    2's does, a matcher still counts it.)
    """

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], special: list[int], eos: int) -> None:
        self.eos_token_id = eos
        self.bos_token_id = None
        self.tokens = tokens
        self.special_token_ids = special
        self._tokenizer = tokenizer
        hidden = set(special)
        self._by_bytes = {data: token_id for token_id, data in enumerate(tokens) if token_id not in hidden}
        self._longest = max(map(len, tokens), default=0)

    def __call__(self, text: str) -> list[int]:
        """The ids in which the model would write a text that goes on from another, without a space before it
        that the tokenizer puts before every text.
        """
        ids: list[int] = self._tokenizer.encode(_BEFORE + text, add_special_tokens=False).ids
        wanted, found = text.encode(), b""
        for start in range(len(ids), 0, -1):
            if len(found) >= len(wanted):
                break
            token_id = ids[start - 1]
            found = (self.tokens[token_id] if token_id < len(self.tokens) else b"") + found
        else:
            start = 0
        return ids[start:] if found == wanted else self._piece_by_piece(wanted)

    def _piece_by_piece(self, text: bytes) -> list[int]:
        """The longest token that fits, again and again; nothing where there is none."""
        ids: list[int] = []
        while text:
            for length in range(min(len(text), self._longest), 0, -1):
                if (token_id := self._by_bytes.get(text[:length])) is not None:
                    ids.append(token_id)
                    text = text[length:]
                    break
            else:
                return []
        return ids


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Immutable and shared by all matchers.

    Attributes:
        tokenizer: for llguidance. For a model without an end it has one token more, which is in no mask.
        vocab_size: the model's.
        eos_token_ids: the model's.
    """

    tokenizer: LLTokenizer
    vocab_size: int
    eos_token_ids: tuple[int, ...]

    @classmethod
    def load(cls, model_dir: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> Vocabulary:
        """Reads a model directory's tokenizer; takes some tenths of a second.

        Raises:
            ConfigError: it has none, or one of a kind that is not understood.
        """
        tokenizer = read_tokenizer(model_dir)
        tokens = token_bytes(tokenizer)[:vocab_size]
        tokens += [b""] * (vocab_size - len(tokens))
        special = {*special_token_ids(tokenizer), *eos_token_ids}
        eos = list(eos_token_ids)
        if not eos:
            eos = [vocab_size]
            special.add(vocab_size)
            tokens.append(b"<no end>")
        wrapper = _Tokens(tokenizer, tokens, sorted(t for t in special if t < len(tokens)), eos[0])
        with no_panics(
            lambda reason: ConfigError(f"{model_dir}: its tokens cannot be constrained: {reason}")
        ):
            tokens_for_grammars = LLTokenizer(cast(TokenizerWrapper, wrapper), eos_token=eos)
        return cls(tokens_for_grammars, vocab_size, eos_token_ids)
