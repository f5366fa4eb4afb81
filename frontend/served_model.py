"""The model as the frontend knows it: its names and everything about its text."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frontend.adapter_names import AdapterNames
from frontend.chat.reply_format import ReplyFormat
from frontend.chat.settings import ChatSettings
from frontend.checkpoint import CheckpointFacts
from frontend.pooling import EmbeddingFacts
from frontend.scoring.facts import ScoringFacts
from frontend.text.chat_template import ChatTemplate
from frontend.text.generation_defaults import load_generation_defaults
from frontend.text.rendered_prompt import RenderedPrompt, encode_prompt
from frontend.text.template_renderer import RENDERER
from frontend.text.tokenizer import TextTokenizer
from frontend.text.tokenizer_config import TokenizerFacts
from pagewire.base.errors import ConfigError, InvalidRequest, NotFound
from pagewire.wire.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.tiktoken", "*.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """Immutable after loading but for its adapters; shared by every request.

    Attributes:
        names: what requests may call it, the first being the one that answers carry.
        tokenizer: text to ids and back.
        template: renders conversations, or None if the model has none.
        replies: how its messages are written.
        message_tokenizer: the tokenizer, with the marks of that format as text.
        defaults: sampling parameters the model's authors recommend, by SamplingParams field.
        content_tokenizer: the tokenizer, with control tokens that a text spells being text; None where the
            template writes control tokens as their texts.
        tokenizer_facts: what its files say of the tokenizer.
        embedding: how its hidden states become vectors.
        scoring: how its logits become probabilities and scores.
        checkpoint: what its directory tells of its weights.
        created: Unix seconds since when it is served.
        adapters: what is served beside it, under names of their own.
    """

    names: tuple[str, ...]
    tokenizer: TextTokenizer
    template: ChatTemplate | None
    replies: ReplyFormat
    message_tokenizer: TextTokenizer
    defaults: Mapping[str, Any]
    content_tokenizer: TextTokenizer | None = None
    tokenizer_facts: TokenizerFacts = field(default_factory=TokenizerFacts)
    embedding: EmbeddingFacts = field(default_factory=EmbeddingFacts)
    scoring: ScoringFacts = field(default_factory=ScoringFacts)
    checkpoint: CheckpointFacts = field(default_factory=CheckpointFacts)
    created: int = field(default_factory=lambda: int(time.time()))
    adapters: AdapterNames = field(default_factory=AdapterNames)

    @classmethod
    def load(
        cls,
        directory: Path,
        names: tuple[str, ...],
        chat: ChatSettings | None = None,
        *,
        pooling: str | None = None,
        score_template: str | None = None,
        classifier_from_token: tuple[str, ...] = (),
    ) -> ServedModel:
        """Reads a model directory's tokenizer, template, defaults and facts. Slow: not for the event loop.

        Args:
            directory: in Hugging Face layout.
            names: what requests may call the model.
            chat: what the operator decided about conversations, if anything.
            pooling: how hidden states are pooled, instead of the model's own way.
            score_template, classifier_from_token: see `FrontendConfig`.

        Raises:
            ConfigError: a file is missing or wrong.
        """
        chat = chat or ChatSettings()
        RENDERER.start()  # which takes as long as reading the tokenizer
        defaults = load_generation_defaults(directory)
        try:
            SamplingParams(**defaults)
        except (InvalidRequest, TypeError) as error:
            raise ConfigError(f"{directory}: generation_config.json: {error}") from error
        tokenizer, checkpoint = _tokenizer(directory), CheckpointFacts.load(directory)
        template = ChatTemplate.load(
            directory,
            chat.template,
            trust_requests=chat.trust_request_template,
            has_token=lambda token: tokenizer.token_id(token) is not None,
        )
        source = "" if template is None else template.source
        replies = ReplyFormat.choose(source, tokenizer.special_tokens, chat)
        return cls(
            names=names,
            tokenizer=tokenizer,
            template=template,
            replies=replies,
            message_tokenizer=tokenizer.showing(replies.marks),
            content_tokenizer=(
                tokenizer.with_controls_as_text() if template and template.marks_controls else None
            ),
            defaults=defaults,
            tokenizer_facts=TokenizerFacts.load(directory),
            embedding=EmbeddingFacts.load(directory, pooling),
            scoring=ScoringFacts.load(
                checkpoint.config, tokenizer, template=score_template, tokens=classifier_from_token
            ),
            checkpoint=checkpoint,
        )

    def encode_prompt(self, prompt: RenderedPrompt) -> list[int]:
        """The ids of a conversation that the template rendered. Slow: not for the event loop.

        Raises:
            InvalidRequest: the text is not valid Unicode.
        """
        return encode_prompt(prompt, self.tokenizer, self.content_tokenizer or self.tokenizer)

    @property
    def all_names(self) -> tuple[str, ...]:
        """What requests may call the model, and its adapters."""
        return (*self.names, *(name for name in self.adapters if name not in self.names))

    def adapter_id(self, name: str) -> int:
        """The scheduler's id of the adapter of this name; 0 for a name of the model."""
        return 0 if name in self.names else self.adapters.id_of(name)

    def check_name(self, name: str) -> None:
        """Accepts one of this model's names or of its adapters', or none at all.

        Raises:
            NotFound: the name is another.
        """
        if name and name not in self.names and name not in self.adapters:
            raise NotFound(
                f"the model {name!r} does not exist; this server has {', '.join(map(repr, self.all_names))}",
                param="model",
            )


def _tokenizer(directory: Path) -> TextTokenizer:
    if any(any(directory.glob(pattern)) for pattern in _TOKENIZER_FILES):
        return TextTokenizer.load(directory)
    logger.warning("%s has no tokenizer: requests must send token ids, and get no text", directory)
    return TextTokenizer.without_text()
