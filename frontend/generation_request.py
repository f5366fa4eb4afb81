"""What a client asked for, in the one form that both protocols turn their requests into."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from frontend.chat.conversation import Conversation as Conversation
from pagewire.errors import InvalidRequest
from pagewire.sampling_params import SamplingParams

MAX_REQUEST_ID_LENGTH = 128
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


_NOT_SERVED_YET: Mapping[str, Any] = {
    "n": 1,
    "best_of": None,
    "bad_words": (),
    "prompt_logprobs": None,
    "structured_output": None,
    "beam_search": None,
}

Prompt = TextPrompt | TokenPrompt | Conversation


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A completion to generate, checked as far as that is possible without the model.

    Attributes:
        request_id: the public id, as `check_request_id` returned it.
        model: the name asked for; empty means the server's only model.
        prompt: what to continue.
        sampling: how to sample and when to stop, the model's own defaults already in it.
        priority: lower goes first.
        timeout: seconds from now until the request is ended, or None.

    Raises:
        InvalidRequest: priority or timeout is out of range.
    """

    request_id: str
    model: str
    prompt: Prompt
    sampling: SamplingParams
    priority: int = 0
    timeout: float | None = None

    def __post_init__(self) -> None:
        sampling = self.sampling
        for name, nothing in _NOT_SERVED_YET.items():
            if getattr(sampling, name) != nothing:
                raise InvalidRequest(
                    f"{name} is {getattr(sampling, name)}; this server does not support it", param=name
                )
        if self.priority not in INT32_RANGE:
            raise InvalidRequest(
                f"priority is {self.priority}; it must be a signed 32-bit integer", param="priority"
            )
        if self.timeout is not None and not self.timeout < float("inf"):
            raise InvalidRequest(
                f"timeout is {self.timeout}; it must be a finite number of seconds", param="timeout"
            )


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
    """The parameters given, over the model's own defaults (generation_config.json).

    Raises:
        InvalidRequest: a value is out of its range.
    """
    assert _SAMPLING_FIELDS.issuperset(given)
    return SamplingParams(**{**defaults, **given})
