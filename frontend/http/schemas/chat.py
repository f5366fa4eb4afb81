"""Conversations, and POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from frontend.generation_request import Conversation, Prompt
from frontend.http.schemas.base import Body
from frontend.http.schemas.generation import GenerationBody
from pagewire.errors import InvalidRequest


class TextPart(Body):
    """A piece of a message's content. Only text is served."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One turn. `content` is text, whole or in parts."""

    role: str
    content: str | list[TextPart]
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        content = self.content
        turn = {
            "role": self.role,
            "content": content if isinstance(content, str) else "".join(part.text for part in content),
        }
        if self.name is not None:
            turn["name"] = self.name
        return turn


class ChatCompletionBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[Message]
    add_generation_prompt: bool = True
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def prompt_to_continue(self) -> Prompt:
        return conversation(self.messages, self.add_generation_prompt)

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
        if self.top_logprobs is not None:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        return None


def conversation(messages: Sequence[Message], add_generation_prompt: bool) -> Conversation:
    """Messages in the pipeline's form."""
    return Conversation(
        messages=[message.for_template() for message in messages],
        add_generation_prompt=add_generation_prompt,
    )
