"""What prompts are made of: token ids, text that a tokenizer counts, or words."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pagewire.base.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHARACTERS_PER_TOKEN = 4
"""Of English text, about; only where there is no tokenizer to ask."""

# Common English words that most vocabularies have as one token, with the space before them.
_WORDS = re.findall(
    r"\w+",
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work government number night point "
    "home water room mother area money story fact month lot right study book eye job word business issue "
    "side kind head house service friend father power hour game line end member law car city community "
    "name president team minute idea kid body information back parent face others level office door "
    "health person",
)
_ATTEMPTS = 8


@dataclass(slots=True)
class PromptMaker:
    """Makes prompts of a given number of tokens. Cheap to send to another process: a tokenizer is read when
    it is first needed.

    Attributes:
        kind: "ids" sends token ids; "text" sends text, of a tokenizer's tokens or of common words.
        vocab_size: ids are smaller than this.
        tokenizer_file: its tokenizer.json; None has none.
    """

    kind: Literal["ids", "text"] = "ids"
    vocab_size: int = 32_000
    tokenizer_file: Path | None = None
    _tokenizer: Tokenizer | None = field(default=None, repr=False, compare=False)
    _usual: Sequence[int] = field(default=(), repr=False, compare=False)

    def token_ids(self, generator: random.Random, count: int) -> list[int]:
        """`count` token ids, or what stands for them until `prompt` writes them out."""
        if self.kind == "ids":
            choices: Sequence[int] = range(self.vocab_size)
        elif self.tokenizer_file is None:
            choices = range(len(_WORDS))
        else:
            choices = self._usual or self._read()[1]
        return generator.choices(choices, k=count)

    def prompt(self, token_ids: list[int]) -> list[int] | str:
        """The prompt that ids make. Text has as many tokens as they are where the tokenizer lets it, and
        begins like the text of other ids that begin like these."""
        if self.kind == "ids":
            return token_ids
        if self.tokenizer_file is None:
            return " ".join(_WORDS[token_id] for token_id in token_ids)
        return self._text(token_ids)

    def count(self, text: str) -> int:
        """A text's tokens; without a tokenizer a guess by its length."""
        if self.tokenizer_file is None:
            return max(1, len(text) // CHARACTERS_PER_TOKEN)
        tokenizer = self._tokenizer or self._read()[0]
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    def _text(self, token_ids: list[int]) -> str:
        """Encoding the text of random tokens gives other tokens, and seldom as many: cut and fill until it
        fits."""
        tokenizer = self._tokenizer or self._read()[0]
        wanted = len(token_ids)
        filling = random.Random(f"{token_ids[-8:]}")
        ids = token_ids
        text: str = tokenizer.decode(ids, skip_special_tokens=False)
        for _ in range(_ATTEMPTS):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            if len(ids) == wanted:
                break
            ids = ids[:wanted] + filling.choices(self._usual, k=max(0, wanted - len(ids)))
            text = tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def _read(self) -> tuple[Tokenizer, Sequence[int]]:
        from tokenizers import Tokenizer

        if self.tokenizer_file is None:
            raise ConfigError("there is no tokenizer to read")
        path = self.tokenizer_file
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise ConfigError(f"{path}: cannot be read: {error}", param="tokenizer") from error
        special = {id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        usual = [
            token_id
            for token_id in range(tokenizer.get_vocab_size())
            if token_id not in special and tokenizer.decode([token_id]).isascii()
        ]
        if not usual:
            raise ConfigError(f"{path}: has no token of ASCII text", param="tokenizer")
        self._tokenizer, self._usual = tokenizer, usual
        return tokenizer, usual
