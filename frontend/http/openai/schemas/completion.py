"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from frontend.generation.request import MAX_CHOICES, Prompt, TextPrompt, TokenPrompt, require_at_most
from frontend.http.body import TokenIdList
from frontend.http.openai.schemas.generation import GenerationBody

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, for this endpoint alone: texts have no end of their own, as turns of a conversation do."""


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    defaults: ClassVar = {
        **GenerationBody.defaults,
        "max_tokens": DEFAULT_MAX_TOKENS,
        "echo": False,
    }
    forms: ClassVar = {"prompt": "a string, a list of token ids, or a list of either"}

    prompt: str | TokenIdList | Annotated[list[str | TokenIdList], Field(fail_fast=True)]
    add_special_tokens: bool = True
    echo: bool | None = None
    logprobs: int | None = None

    def prompts_to_continue(self) -> Sequence[Prompt]:
        prompt = self.prompt
        several = isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int))
        if several:
            require_at_most(MAX_CHOICES, len(prompt), "prompt")
        return [
            TextPrompt(text=each, add_special_tokens=self.add_special_tokens)
            if isinstance(each, str)
            else TokenPrompt(token_ids=each)  # type: ignore[arg-type]
            for each in (prompt if several else [prompt])
        ]

    def limit(self) -> int:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def wants_echo(self) -> bool:
        return bool(self.echo)

    def num_top_logprobs(self) -> int | None:
        return self.logprobs
