"""What the JSON files beside a tokenizer's vocabulary say of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pagewire.base.errors import ConfigError
from pagewire.hub.model_files import read_json_object
from pagewire.hub.tokenizer.byte_level import MAX_TOKEN_ID
from pagewire.hub.tokenizer.document import AddedToken

SETTINGS_FILES = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSettings:
    """Attributes:
    tokenizer_class: the name of its class in transformers; empty if no file says it.
    added: tokens that have an id of their own, by id.
    named: the texts of bos_token and the like, by name.
    special: the texts of all control tokens that the files name, in their order.
    add_bos_token, add_eos_token: whether texts get them; None if no file says it.
    legacy: whether the dummy prefix is put again behind special tokens.
    add_prefix_space: whether there is a dummy prefix; None if no file says it.
    """

    tokenizer_class: str = ""
    added: Mapping[int, AddedToken] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)
    special: tuple[str, ...] = ()
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    legacy: bool = True
    add_prefix_space: bool | None = None

    @classmethod
    def load(cls, model_dir: Path) -> TokenizerSettings:
        """Reads them, as far as they are there; a field of a strange type counts as missing.

        Raises:
            ConfigError: a file is no JSON object, or gives a token no id.
        """
        config, added, mapped = (_read(model_dir / name) for name in SETTINGS_FILES)
        both = {**mapped, **{name: value for name, value in config.items() if value is not None}}
        named = {name: text for name in _NAMES if (text := _text(both.get(name))) is not None}
        more = both.get("additional_special_tokens")
        texts = [_text(token) for token in more] if isinstance(more, list) else []
        name = config.get("tokenizer_class")
        return cls(
            tokenizer_class=name if isinstance(name, str) else "",
            added={
                token.id: token
                for token in (
                    *_listed(model_dir / "added_tokens.json", added),
                    *_decoded(model_dir / "tokenizer_config.json", config.get("added_tokens_decoder")),
                )
            },
            named=named,
            special=tuple(dict.fromkeys([*named.values(), *(text for text in texts if text is not None)])),
            add_bos_token=_flag(config.get("add_bos_token")),
            add_eos_token=_flag(config.get("add_eos_token")),
            legacy=config.get("legacy") is not False,
            add_prefix_space=_flag(config.get("add_prefix_space")),
        )


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _listed(path: Path, added: Mapping[str, Any]) -> Iterator[AddedToken]:
    """Of added_tokens.json: ids by text."""
    for content, token_id in added.items():
        yield AddedToken(id=_id(path, content, token_id), content=content)


def _decoded(path: Path, added: Any) -> Iterator[AddedToken]:
    """Of added_tokens_decoder: by id, an object with the text and flags."""
    for key, entry in added.items() if isinstance(added, dict) else ():
        content = _text(entry)
        if content is None or not isinstance(entry, dict):
            raise ConfigError(f"{path}: the token {key} of added_tokens_decoder has no content")
        token_id = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else key
        # A token that is normalized is one that transformers' own tokenizers look for as it is.
        flags = {name: entry.get(name) is True for name in _FLAGS if name != "normalized"}
        yield AddedToken(id=_id(path, content, token_id), content=content, **flags)


def _id(path: Path, content: str, token_id: Any) -> int:
    is_integer = isinstance(token_id, int) and not isinstance(token_id, bool)
    if not content or not is_integer or not 0 <= token_id <= MAX_TOKEN_ID:
        raise ConfigError(
            f"{path}: the token {content[:100]!r} has the id {str(token_id)[:100]!r}; an id is a number "
            f"between 0 and {MAX_TOKEN_ID}"
        )
    return int(token_id)


def _text(value: Any) -> str | None:
    """A token's text, which is a string, or an object with it in `content`; None for anything else."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None
