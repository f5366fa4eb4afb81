"""What the endpoints answer, for /openapi.json. Answers are put together elsewhere, for speed; the tests hold
them to these models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

Logprob = float | None


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str = Field(description="What was wrong, what is allowed and what to do.")
    type: str
    param: str | None = Field(description="The field at fault, if one is.")
    code: str | None


class ErrorAnswer(BaseModel):
    """Every error has this form. In a stream that has begun, it is the last event."""

    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    """What the prompt's tokens cost."""

    cached_tokens: int = Field(description="How many came from the prefix cache instead of being computed.")


class UsageAnswer(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ChatTokenLogprob(BaseModel):
    """A candidate token."""

    token: str
    logprob: Logprob
    bytes: list[int]


class ChatPositionLogprobs(ChatTokenLogprob):
    """A generated token and the likeliest ones at its place."""

    top_logprobs: list[ChatTokenLogprob]


class ChatLogprobs(BaseModel):
    """Log probabilities of a message."""

    content: list[ChatPositionLogprobs]
    refusal: None


class PromptLogprob(BaseModel):
    """A token at a position of the prompt."""

    logprob: Logprob
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class FunctionAnswer(BaseModel):
    """A function and its arguments, a JSON object as text."""

    name: str
    arguments: str


class ToolCallAnswer(BaseModel):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: FunctionAnswer


class ChatMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallAnswer] | None = None


FinishReason = Literal["stop", "length", "tool_calls", "abort"]
StopReason = Annotated[
    str | int | None,
    Field(
        description="The stop string or the id of the stop token that ended the choice; null if neither did, "
        "as when the model itself came to an end. In a stream it comes with finish_reason."
    ),
]


class ChatChoice(BaseModel):
    """One of several completions."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: StopReason
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    """The answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class FunctionDelta(BaseModel):
    """More of a call's name and arguments."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(BaseModel):
    """More of a call; id, type and name come with its first delta."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(BaseModel):
    """More of a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    """More of one completion."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: StopReason = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(BaseModel):
    """An event of a streamed chat completion. The last one is `data: [DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageAnswer | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class TextLogprobs(BaseModel):
    """Log probabilities of a text, in columns."""

    tokens: list[str]
    token_logprobs: list[Logprob]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One of several completions."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: StopReason = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class TextCompletion(BaseModel):
    """The answer of POST /v1/completions, and every event of a streamed one. The last is `data: [DONE]`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageAnswer | None = None


class OutputLogprob(BaseModel):
    """A candidate token."""

    token: str
    logprob: Logprob
    bytes: list[int] | None = None


class OutputPositionLogprobs(OutputLogprob):
    """A generated token and the likeliest ones at its place."""

    top_logprobs: list[OutputLogprob]


class OutputText(BaseModel):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[OutputPositionLogprobs]


class ReasoningText(BaseModel):
    """What the model thought."""

    type: Literal["reasoning_text"]
    text: str


ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(BaseModel):
    """What the model says."""

    type: Literal["message"]
    id: str
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class OutputFunctionCall(BaseModel):
    """A call that the model makes."""

    type: Literal["function_call"]
    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class OutputReasoning(BaseModel):
    """What the model thinks before it answers."""

    type: Literal["reasoning"]
    id: str
    status: ItemStatus
    summary: list[Any]
    content: list[ReasoningText]
    encrypted_content: None


OutputItem = Annotated[OutputMessage | OutputFunctionCall | OutputReasoning, Field(discriminator="type")]


class InputTokensDetails(BaseModel):
    """What the prompt's tokens cost."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(BaseModel):
    """What the answer's tokens were for."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(BaseModel):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(BaseModel):
    """Why a response is not whole."""

    reason: Literal["max_output_tokens"]


class ResponseAnswer(BaseModel):
    """The answer of POST /v1/responses. Nothing of it is stored."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    user: str | None


class _NumberedEvent(BaseModel):
    sequence_number: int


class ResponseLifeEvent(_NumberedEvent):
    """The beginning or the end of a response."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ResponseAnswer


class ResponseItemEvent(_NumberedEvent):
    """The beginning or the end of an item."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class _PlacedEvent(_NumberedEvent):
    item_id: str
    output_index: int


class ResponsePartEvent(_PlacedEvent):
    """The beginning or the end of a piece of an item."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: int
    part: Annotated[OutputText | ReasoningText, Field(discriminator="type")]


class ResponseTextDeltaEvent(_PlacedEvent):
    """More text."""

    type: Literal["response.output_text.delta"]
    content_index: int
    delta: str
    logprobs: list[OutputPositionLogprobs]


class ResponseTextDoneEvent(_PlacedEvent):
    """All of the text."""

    type: Literal["response.output_text.done"]
    content_index: int
    text: str
    logprobs: list[OutputPositionLogprobs]


class ResponseReasoningDeltaEvent(_PlacedEvent):
    """More thoughts."""

    type: Literal["response.reasoning_text.delta"]
    content_index: int
    delta: str


class ResponseReasoningDoneEvent(_PlacedEvent):
    """All of the thoughts."""

    type: Literal["response.reasoning_text.done"]
    content_index: int
    text: str


class ResponseArgumentsDeltaEvent(_PlacedEvent):
    """More of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ResponseArgumentsDoneEvent(_PlacedEvent):
    """All of a call's arguments."""

    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


ResponseEvent = Annotated[
    ResponseLifeEvent
    | ResponseItemEvent
    | ResponsePartEvent
    | ResponseTextDeltaEvent
    | ResponseTextDoneEvent
    | ResponseReasoningDeltaEvent
    | ResponseReasoningDoneEvent
    | ResponseArgumentsDeltaEvent
    | ResponseArgumentsDoneEvent,
    Field(discriminator="type"),
]


class EmbeddingAnswer(BaseModel):
    """One input's vector: numbers, or their little-endian 32-bit floats in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Token counts of all inputs together."""

    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class EmbeddingList(BaseModel):
    """The answer of POST /v1/embeddings."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[EmbeddingAnswer]
    usage: EmbeddingUsage
