"""Prompts as `LLM.generate` takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from frontend.generation.prompts import num_kept
from frontend.generation.request import check_cache_salt, check_truncation
from frontend.text.tokenizer import TextTokenizer
from pagewire.base.errors import InvalidRequest
from pagewire.wire.sampling_params import SamplingParams

_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


class TextPrompt(TypedDict):
    """A text. Cached prefixes are shared only between prompts of the same salt."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """Token ids, and perhaps the text that they were made of, which is only shown."""

    prompt_token_ids: Sequence[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt


@dataclass(frozen=True, slots=True)
class OfflinePrompt:
    """A prompt as tokens.

    Attributes:
        text: as it was given, if it was.
        token_ids: what the model reads.
        cache_salt: cached prefixes are shared only between prompts of the same one.
    """

    text: str | None
    token_ids: list[int]
    cache_salt: str = ""


def read_prompt(
    prompt: Prompt,
    tokenizer: TextTokenizer,
    sampling: SamplingParams,
    max_model_len: int,
    truncate_prompt_tokens: int | None = None,
) -> OfflinePrompt:
    """The tokens of a prompt.

    Args:
        prompt: in any form.
        tokenizer: the model's.
        sampling: how it is to be continued.
        max_model_len: the model's context.
        truncate_prompt_tokens: keeps this many tokens at its end; -1 keeps what has room beside max_tokens.

    Raises:
        InvalidRequest: it has none of the forms, or a value is out of range.
    """
    fields = _fields(prompt)
    unknown = [key for key in fields if key not in _KEYS]
    text, token_ids = fields.get("prompt"), fields.get("prompt_token_ids")
    if unknown or (text is None and token_ids is None):
        raise InvalidRequest(
            f"a prompt has {', '.join(map(repr, fields)) or 'nothing'}; it must have 'prompt', a text, or "
            "'prompt_token_ids', and may have 'cache_salt'",
            param="prompts",
        )
    salt = fields.get("cache_salt") or ""
    check_cache_salt(salt)
    check_truncation(truncate_prompt_tokens)
    ids = list(tokenizer.encode(str(text)) if token_ids is None else token_ids)
    kept = num_kept(truncate_prompt_tokens, sampling.max_tokens, max_model_len)
    return OfflinePrompt(text, ids if kept is None else ids[-kept:], salt)


def _fields(prompt: Prompt) -> Mapping[str, Any]:
    if isinstance(prompt, Mapping):
        return prompt
    return {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt}
