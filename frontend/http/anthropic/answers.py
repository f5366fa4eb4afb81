"""What the endpoints of messages answer, for /openapi.json; the tests hold the answers to these models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field


class MessageErrorDetail(BaseModel):
    """What went wrong."""

    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "timeout_error",
        "request_too_large",
        "rate_limit_error",
        "api_error",
        "overloaded_error",
    ]
    message: str = Field(description="What was wrong, what is allowed and what to do.")


class MessageErrorAnswer(BaseModel):
    """Every error under /v1/messages has this form. In a stream that has begun, it is the last event."""

    type: Literal["error"]
    error: MessageErrorDetail
    request_id: str | None


class MessageUsage(BaseModel):
    """Token counts. The prompt has those of all three kinds of input together."""

    input_tokens: int = Field(description="Tokens of the prompt that were computed.")
    cache_creation_input_tokens: int = Field(description="Always 0: caching costs nothing.")
    cache_read_input_tokens: int = Field(description="Tokens of the prompt that came from the prefix cache.")
    output_tokens: int


class ThinkingAnswer(BaseModel):
    """What the model thought."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class TextAnswer(BaseModel):
    """What it said."""

    type: Literal["text"]
    text: str


class ToolUseAnswer(BaseModel):
    """A call that it made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


BlockAnswer = Annotated[ThinkingAnswer | TextAnswer | ToolUseAnswer, Field(discriminator="type")]

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class StopAnswer(BaseModel):
    """Why a message ended."""

    stop_reason: StopReason | None
    stop_sequence: str | None


class MessageAnswer(StopAnswer):
    """The answer of POST /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[BlockAnswer]
    usage: MessageUsage


class TokenCount(BaseModel):
    """The answer of POST /v1/messages/count_tokens."""

    input_tokens: int


class MessageStartEvent(BaseModel):
    """The message, before anything is in it."""

    type: Literal["message_start"]
    message: MessageAnswer


class BlockStartEvent(BaseModel):
    """A block, before anything is in it."""

    type: Literal["content_block_start"]
    index: int
    content_block: BlockAnswer


class PingEvent(BaseModel):
    """Nothing happened."""

    type: Literal["ping"]


class TextDelta(BaseModel):
    """More text."""

    type: Literal["text_delta"]
    text: str


class ThinkingDelta(BaseModel):
    """More thoughts."""

    type: Literal["thinking_delta"]
    thinking: str


class SignatureDelta(BaseModel):
    """The end of thoughts."""

    type: Literal["signature_delta"]
    signature: str


class InputJsonDelta(BaseModel):
    """More of a call's input, as JSON."""

    type: Literal["input_json_delta"]
    partial_json: str


class BlockDeltaEvent(BaseModel):
    """More of a block."""

    type: Literal["content_block_delta"]
    index: int
    delta: Annotated[TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta, Field(discriminator="type")]


class BlockStopEvent(BaseModel):
    """The end of a block."""

    type: Literal["content_block_stop"]
    index: int


class MessageDeltaEvent(BaseModel):
    """The end of the message, and final counts."""

    type: Literal["message_delta"]
    delta: StopAnswer
    usage: MessageUsage


class MessageStopEvent(BaseModel):
    """Nothing follows."""

    type: Literal["message_stop"]


MessageEvent = Annotated[
    MessageStartEvent
    | BlockStartEvent
    | PingEvent
    | BlockDeltaEvent
    | BlockStopEvent
    | MessageDeltaEvent
    | MessageStopEvent
    | MessageErrorAnswer,
    Field(discriminator="type"),
]
