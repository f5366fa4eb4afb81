"""The model as the frontend knows it: its names and everything about its text."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frontend.text.chat_template import ChatTemplate
from frontend.text.generation_defaults import load_generation_defaults
from frontend.text.tokenizer import TextTokenizer
from pagewire.errors import ConfigError, InvalidRequest, NotFound
from pagewire.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.tiktoken", "*.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """Immutable after loading; shared by every request.

    Attributes:
        names: what requests may call it, the first being the one that answers carry.
        tokenizer: text to ids and back.
        template: renders conversations, or None if the model has none.
        defaults: sampling parameters the model's authors recommend, by SamplingParams field.
        created: Unix seconds since when it is served.
    """

    names: tuple[str, ...]
    tokenizer: TextTokenizer
    template: ChatTemplate | None
    defaults: Mapping[str, Any]
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def load(cls, directory: Path, names: tuple[str, ...], chat_template: Path | None) -> ServedModel:
        """Reads a model directory's tokenizer, template and defaults. Slow: not for the event loop.

        Raises:
            ConfigError: a file is missing or wrong.
        """
        defaults = load_generation_defaults(directory)
        try:
            SamplingParams(**defaults)
        except (InvalidRequest, TypeError) as error:
            raise ConfigError(f"{directory}: generation_config.json: {error}") from error
        return cls(
            names=names,
            tokenizer=_tokenizer(directory),
            template=ChatTemplate.load(directory, chat_template),
            defaults=defaults,
        )

    def check_name(self, name: str) -> None:
        """Accepts one of this model's names, or none at all.

        Raises:
            NotFound: the name is another.
        """
        if name and name not in self.names:
            raise NotFound(
                f"the model {name!r} does not exist; this server has {', '.join(map(repr, self.names))}",
                param="model",
            )


def _tokenizer(directory: Path) -> TextTokenizer:
    if any(any(directory.glob(pattern)) for pattern in _TOKENIZER_FILES):
        return TextTokenizer.load(directory)
    logger.warning("%s has no tokenizer: requests must send token ids, and get no text", directory)
    return TextTokenizer.without_text()
