"""What a model's tokenizer_config.json says beside its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pagewire.hub.model_files import read_json_object

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_DEFAULT_CLASS = "PreTrainedTokenizerFast"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFacts:
    """What clients that use the tokenizer from afar want to know of it.

    Attributes:
        tokenizer_class: the name of its class in transformers.
        special_tokens: the texts of the tokens of `SPECIAL_TOKENS` that it has.
        additional_special_tokens: further ones.
        add_bos_token, add_eos_token: whether texts get them, None if the file does not say.
    """

    tokenizer_class: str = _DEFAULT_CLASS
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    additional_special_tokens: tuple[str, ...] = ()
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None

    @classmethod
    def load(cls, model_dir: Path) -> TokenizerFacts:
        """Reads them; a field of a strange type counts as missing.

        Raises:
            ConfigError: the file is no JSON object.
        """
        config = read_tokenizer_config(model_dir)
        name = config.get("tokenizer_class")
        more = config.get("additional_special_tokens")
        texts = [token_text(token) for token in more] if isinstance(more, list) else []
        return cls(
            tokenizer_class=name if isinstance(name, str) else _DEFAULT_CLASS,
            special_tokens=special_token_texts(config),
            additional_special_tokens=tuple(text for text in texts if text is not None),
            add_bos_token=_flag(config.get("add_bos_token")),
            add_eos_token=_flag(config.get("add_eos_token")),
        )


def read_tokenizer_config(model_dir: Path) -> dict[str, Any]:
    """The file's content, empty if there is none.

    Raises:
        ConfigError: it is no JSON object.
    """
    path = model_dir / "tokenizer_config.json"
    return read_json_object(path) if path.exists() else {}


def special_token_texts(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like, by name."""
    texts = {name: token_text(config.get(name)) for name in SPECIAL_TOKENS}
    return {name: text for name, text in texts.items() if text is not None}


def token_text(value: Any) -> str | None:
    """A token's text, which is a string, or an object with it in `content`; None for anything else."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None
