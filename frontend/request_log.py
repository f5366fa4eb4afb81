"""What was asked for, request by request, if `--enable-log-requests` says so."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import fields

from frontend.generation.prompts import PromptTokens
from frontend.generation.request import GenerationRequest, Prompt, TextPrompt, TokenPrompt
from pagewire.wire.sampling_params import SamplingParams

logger = logging.getLogger("frontend.requests")

_WORDED = frozenset(("stop", "bad_words", "structured_output"))
"""Parameters that a client wrote in words of its own, which are shown only where prompts are."""


class RequestLog:
    """Writes a line for every request that is about to be submitted, or, if it is not enabled, none."""

    def __init__(self, *, enabled: bool, max_log_len: int) -> None:
        """Args:
        max_log_len: how many characters (or token ids) of each prompt are shown; 0 shows nothing of what
            clients wrote.
        """
        self._enabled = enabled
        self._max_log_len = max_log_len

    def submitted(self, request: GenerationRequest, prompts: Sequence[PromptTokens]) -> None:
        """Notes a request and how long its prompts have become."""
        if not self._enabled:
            return
        lengths = ", ".join(str(len(prompt.token_ids)) for prompt in prompts)
        parts = [f"request {request.request_id}: prompt of {lengths} tokens"]
        parts += [self._parameter(request.sampling, field.name) for field in fields(SamplingParams)]
        if request.priority:
            parts.append(f"priority={request.priority}")
        if self._max_log_len:
            parts += [f"prompt={_shown(prompt, self._max_log_len)}" for prompt in request.prompts]
        logger.info("%s", ", ".join(filter(None, parts)))

    def _parameter(self, sampling: SamplingParams, name: str) -> str:
        """A parameter as name=value, empty if it has its default."""
        value = getattr(sampling, name)
        if value == getattr(_DEFAULTS, name):
            return ""
        if name in _WORDED:
            return f"{name}={_cut(ascii(value), self._max_log_len)}" if self._max_log_len else f"{name}=..."
        return f"{name}={value!r}"


_DEFAULTS = SamplingParams()


def _shown(prompt: Prompt, length: int) -> str:
    """The beginning of a prompt, on one line."""
    if isinstance(prompt, TokenPrompt):
        more = "..." if len(prompt.token_ids) > length else ""
        return f"{list(prompt.token_ids[:length])}{more}"
    text = prompt.text if isinstance(prompt, TextPrompt) else json.dumps(prompt.messages)
    return ascii(text[:length]) + ("..." if len(text) > length else "")


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}..."
