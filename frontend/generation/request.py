"""What a client asked for, in the one form that both protocols turn their requests into."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from frontend.chat.conversation import Conversation as Conversation
from frontend.generation.message_parser import NewParser
from pagewire.base.errors import InvalidRequest
from pagewire.wire.sampling_params import SAMPLING_ONLY, SamplingParams

MAX_REQUEST_ID_LENGTH = 128
MAX_CACHE_SALT_LENGTH = 256
MAX_CHOICES = 1024
INT32_RANGE = range(-(2**31), 2**31)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPrompt:
    """Plain text to continue."""

    text: str
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPrompt:
    """Token ids to continue, used as they are."""

    token_ids: Sequence[int]


Prompt = TextPrompt | TokenPrompt | Conversation


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """Completions to generate, checked as far as that is possible without the model.

    Attributes:
        request_id: the public id, as `check_request_id` returned it.
        model: the name asked for; empty means the server's only model.
        prompts: what to continue; each gets `sampling.n` completions.
        sampling: how to sample and when to stop, the model's own defaults already in it.
        priority: lower goes first.
        client: whose it is; see frontend/caller.py.
        timeout: seconds from now until the request is ended, or None.
        cache_salt: cached prefixes are shared only among requests of the same one.
        truncate_prompt_tokens: keeps this many tokens at each prompt's end; -1 keeps what has room.
        echo: whether the prompts' texts are wanted.
        return_prompt_ids: whether the prompts' token ids are wanted.
        strict_schema: whether a JSON Schema asked for is to be kept to the letter or refused, also where the
            operator relaxes others.
        relaxed: what was asked for and is not enforced: a tool, as "tools.NAME", or a keyword of the schema,
            as "response_format.KEYWORD".
        new_parser: makes what reads a completion's text as a message, if it is to be read as one.

    Raises:
        InvalidRequest: a value is out of range, or there are too many completions.
    """

    request_id: str
    model: str
    prompts: Sequence[Prompt]
    sampling: SamplingParams
    priority: int = 0
    client: str = ""
    timeout: float | None = None
    cache_salt: str = ""
    truncate_prompt_tokens: int | None = None
    echo: bool = False
    return_prompt_ids: bool = False
    strict_schema: bool = True
    relaxed: Sequence[str] = ()
    new_parser: NewParser | None = None

    @property
    def num_choices(self) -> int:
        """Completions in the answer."""
        return len(self.prompts) * self.sampling.n

    @property
    def wants_prompts(self) -> bool:
        """Whether more of the prompts than their lengths is wanted."""
        return self.echo or self.return_prompt_ids or self.sampling.prompt_logprobs is not None

    def __post_init__(self) -> None:
        self._check_amount()
        if self.priority not in INT32_RANGE:
            raise InvalidRequest(
                f"priority is {self.priority}; it must be a signed 32-bit integer", param="priority"
            )
        if self.timeout is not None and not self.timeout < float("inf"):
            raise InvalidRequest(
                f"timeout is {self.timeout}; it must be a finite number of seconds", param="timeout"
            )
        check_cache_salt(self.cache_salt)
        check_truncation(self.truncate_prompt_tokens)

    def _check_amount(self) -> None:
        sampling = self.sampling
        if not self.prompts:
            raise InvalidRequest("prompt is a list of 0 prompts; it must have at least one", param="prompt")
        width = 0 if sampling.beam_search is None else sampling.beam_search.width or 0
        num_generated = len(self.prompts) * max(sampling.n, sampling.best_of or 0, width)
        if num_generated > MAX_CHOICES:
            raise InvalidRequest(
                f"{len(self.prompts)} prompts with {num_generated // len(self.prompts)} completions each are "
                f"{num_generated}; a request may have at most {MAX_CHOICES}: send several",
                param="prompt" if len(self.prompts) > 1 else "n",
            )
        if sampling.max_tokens == 0:
            if not self.echo and sampling.prompt_logprobs is None:
                raise InvalidRequest(
                    "max_tokens is 0; it must be at least 1 unless echo or prompt_logprobs is set",
                    param="max_tokens",
                )
            if sampling.beam_search or sampling.best_of or sampling.n > 1:
                raise InvalidRequest(
                    "max_tokens is 0; there is nothing to choose from with n, best_of or beam search",
                    param="max_tokens",
                )


def check_cache_salt(salt: str) -> None:
    """Raises:
    InvalidRequest: it is too long.
    """
    if len(salt) > MAX_CACHE_SALT_LENGTH:
        raise InvalidRequest(
            f"cache_salt has {len(salt)} characters; it must have at most {MAX_CACHE_SALT_LENGTH}",
            param="cache_salt",
        )


def check_truncation(kept: int | None) -> None:
    """Checks truncate_prompt_tokens.

    Raises:
        InvalidRequest: it is neither a number of tokens nor -1.
    """
    if kept is not None and not (kept == -1 or 1 <= kept <= INT32_RANGE[-1]):
        raise InvalidRequest(
            f"truncate_prompt_tokens is {kept}; it must be at least 1, or -1 for as many as the model's "
            "context has room for",
            param="truncate_prompt_tokens",
        )


def require_at_most(most: int, count: int, param: str) -> None:
    """Refuses a list before anything is made of its entries.

    Raises:
        InvalidRequest: it has more than `most`.
    """
    if count > most:
        raise InvalidRequest(f"{param} has {count} entries; at most {most} are taken", param=param)


def check_request_id(request_id: str | None) -> str:
    """The caller's request id, or a fresh one if it gave none.

    Raises:
        InvalidRequest: it is too long or has characters that do not print.
    """
    if not request_id:
        return uuid.uuid4().hex
    if len(request_id) > MAX_REQUEST_ID_LENGTH or not (request_id.isprintable() and request_id.isascii()):
        raise InvalidRequest(
            f"request_id must be at most {MAX_REQUEST_ID_LENGTH} printable ASCII characters",
            param="request_id",
        )
    return request_id


_SAMPLING_FIELDS = frozenset(field.name for field in fields(SamplingParams))


def resolve_sampling(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> SamplingParams:
    """The parameters given, over the model's own defaults (generation_config.json). A search takes none of
    those that say how to sample.

    Raises:
        InvalidRequest: a value is out of its range.
    """
    assert _SAMPLING_FIELDS.issuperset(given)
    if given.get("beam_search") is not None:
        defaults = {name: value for name, value in defaults.items() if name not in SAMPLING_ONLY}
    return SamplingParams(**{**defaults, **given})
