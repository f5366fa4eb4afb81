"""POST /v1/completions."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from frontend.generation_request import Prompt, TextPrompt, TokenPrompt
from frontend.http.schemas.base import TokenIdList
from frontend.http.schemas.generation import GenerationBody
from pagewire.errors import InvalidRequest


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: (
        str
        | TokenIdList
        | Annotated[list[str], Field(fail_fast=True)]
        | Annotated[list[TokenIdList], Field(fail_fast=True)]
    )
    add_special_tokens: bool = True
    logprobs: int | None = None

    def prompt_to_continue(self) -> Prompt:
        prompt = self.prompt
        if isinstance(prompt, list) and (not prompt or not isinstance(prompt[0], int)):
            if len(prompt) != 1:
                raise InvalidRequest(
                    f"prompt is a list of {len(prompt)} prompts; it must have one: send a request for each",
                    param="prompt",
                )
            prompt = prompt[0]  # type: ignore[assignment]
        if isinstance(prompt, str):
            return TextPrompt(text=prompt, add_special_tokens=self.add_special_tokens)
        return TokenPrompt(token_ids=prompt)  # type: ignore[arg-type]

    def num_top_logprobs(self) -> int | None:
        return self.logprobs
