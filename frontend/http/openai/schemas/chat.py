"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import ClassVar, Literal

from frontend.generation.request import Prompt
from frontend.http.openai.schemas.conversation import ConversationFields, Message
from frontend.http.openai.schemas.generation import GenerationBody
from pagewire.base.errors import InvalidRequest


class ChatCompletionBody(ConversationFields, GenerationBody):
    """POST /v1/chat/completions."""

    defaults: ClassVar = {
        **GenerationBody.defaults,
        **ConversationFields.defaults,
        "response_format": {"type": "text"},
        "logprobs": False,
        "verbosity": "medium",
    }

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    verbosity: Literal["low", "medium", "high"] | None = None

    def prompt_to_continue(self) -> Prompt:
        return self.conversation(self.messages)

    def limit(self) -> int | None:
        if self.max_completion_tokens is None:
            return self.max_tokens
        if self.max_tokens not in (None, self.max_completion_tokens):
            raise InvalidRequest(
                "max_tokens and max_completion_tokens differ; send max_completion_tokens only",
                param="max_tokens",
            )
        return self.max_completion_tokens

    def num_top_logprobs(self) -> int | None:
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        return None
