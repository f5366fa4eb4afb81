"""What the endpoints of operation answer, for /openapi.json; the tests hold the answers to these models."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class TokenizeAnswer(BaseModel):
    """The answer of POST /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int | None = Field(description="null while no engine has been attached yet.")
    token_strs: list[str | None] | None = Field(
        description="With return_token_strs: as the vocabulary has them."
    )


class DetokenizeAnswer(BaseModel):
    """The answer of POST /detokenize."""

    prompt: str


class TokenizerInfo(BaseModel):
    """The answer of GET /tokenizer_info, in the words of tokenizer_config.json."""

    tokenizer_class: str
    vocab_size: int = Field(description="One more than the highest id that has a token.")
    model_max_length: int | None = Field(description="null while no engine has been attached yet.")
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    sep_token: str | None
    pad_token: str | None
    cls_token: str | None
    mask_token: str | None
    additional_special_tokens: list[str]
    add_bos_token: bool | None
    add_eos_token: bool | None
    chat_template: str | None = Field(description="The one in use for conversations without tools.")


class ModelAnswer(BaseModel):
    """A served model, with the fields that OpenAI's clients look for and those that Anthropic's do."""

    id: str
    object: Literal["model"]
    type: Literal["model"]
    display_name: str
    lifecycle: Literal["active"]
    created: int
    created_at: str = Field(description="The same by RFC 3339.")
    owned_by: str
    root: str
    parent: str | None = Field(description="Of an adapter, the model that it belongs to.")
    max_model_len: int | None = Field(description="null while no engine has been attached yet.")
    quantization: str | None = Field(description="How the weights are quantized; null for plain numbers.")


class ModelList(BaseModel):
    """The answer of GET /v1/models."""

    object: Literal["list"]
    data: list[ModelAnswer]
    has_more: Literal[False]
    first_id: str
    last_id: str


class StatusAnswer(BaseModel):
    """The answer of probes."""

    status: Literal["ready"]


class ServerHealth(BaseModel):
    """A scheduler behind the frontend."""

    name: str
    healthy: bool = Field(description="Whether it gets requests.")
    reason: str | None = Field(description="Why it gets none.")
    open_requests: int = Field(description="Requests of this frontend that it has.")


class HealthAnswer(BaseModel):
    """The answer of GET /health and /ping, which is 200 as long as the frontend lives."""

    status: Literal["ok", "degraded"] = Field(description="degraded while a scheduler gets no requests.")
    healthy: int = Field(description="Schedulers that get requests.")
    total: int
    servers: list[ServerHealth]


class VersionAnswer(BaseModel):
    """The answer of GET /version."""

    version: str


class LoadAnswer(BaseModel):
    """The answer of GET /load."""

    server_load: int = Field(description="Requests being computed or waiting.")
    num_requests_running: int
    num_requests_waiting: int
    kv_cache_usage: float = Field(description="Share of KV blocks in use by requests, 0 to 1.")
    max_num_seqs: int
    max_num_waiting: int


class EngineAnswer(BaseModel):
    """Facts about the engine and the limits in force."""

    model: str
    dtype: str
    device: str
    vocab_size: int
    hidden_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    task: Literal["generate", "classify", "embed"] = Field(description="What the model is for.")
    labels: list[str] = Field(description="The names of its classes, if it classifies.")
    kernels: str | None = Field(description="What computes on a CPU, such as native avx2, 2 threads.")
    weights: str | None = Field(description="What weights take on a CPU, by number format.")
    quantization: str | None = Field(description="How the weights are quantized; null for plain numbers.")
    kv_cache_dtype: str = Field(description="The number format of keys and values.")


class TimelineEvent(BaseModel):
    """Something that happened to a request."""

    time: float = Field(description="Seconds of Unix time.")
    event: str = Field(
        description="received, queued, scheduled, first token, last token, finished, preempted, worker lost, "
        "worker attached or resumed."
    )
    part: int = Field(description="Which of the request's prompts, completions or beams.")
    detail: str | None


class TimelineDurations(BaseModel):
    """Seconds; null while one end is missing."""

    tokenize: float | None
    queue: float | None
    prefill: float | None
    decode: float | None
    total: float | None


class TimelineAnswer(BaseModel):
    """The answer of GET /v1/requests/{id}. Times are in seconds of Unix time, null until they are known."""

    id: str
    object: Literal["request.timeline"]
    status: Literal["waiting", "running", "finished"]
    trace_id: str | None = Field(description="null if the request is not traced.")
    received: float | None
    queued: float | None
    first_scheduled: float | None
    first_token: float | None
    last_token: float | None
    finished: float | None
    durations: TimelineDurations
    finish_reasons: list[str] = Field(description="stop, length, abort or error, of each part that ended.")
    error: str | None
    prompt_tokens: int
    cached_tokens: int = Field(description="Prompt tokens found in the prefix cache.")
    output_tokens: int
    preemptions: int
    worker_restarts: int
    parts: int = Field(description="How many prompts, completions or beams the request consists of.")
    events: list[TimelineEvent]


class LimitsAnswer(BaseModel):
    """This frontend's limits."""

    max_body_bytes: int
    max_prompt_tokens: int | None
    request_timeout: float


class ServerInfo(BaseModel):
    """The answer of GET /server_info."""

    version: str
    served_model_names: list[str]
    ready: bool
    pooling: str | None = Field(description="How embeddings are pooled if a request does not say.")
    engine: EngineAnswer | None = Field(description="null while no engine has been attached yet.")
    limits: LimitsAnswer
