"""What Ollama's endpoints answer, for /openapi.json; the tests hold the answers to these models."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class OllamaError(BaseModel):
    """An error: the answer, or the last line of a stream that failed."""

    error: str


class OllamaTokenLogprob(BaseModel):
    """A token and its log probability."""

    token: str
    logprob: float
    bytes: list[int]


class OllamaLogprob(OllamaTokenLogprob):
    """The same of a token that was generated, with the likeliest ones."""

    top_logprobs: list[OllamaTokenLogprob] = Field(default_factory=list)


class OllamaFunctionAnswer(BaseModel):
    """The function to call."""

    index: int
    name: str
    arguments: dict[str, Any]


class OllamaCallAnswer(BaseModel):
    """A call that the model makes; in streams, too, it comes whole."""

    id: str
    function: OllamaFunctionAnswer


class OllamaMessageAnswer(BaseModel):
    """The model's turn, or more of it."""

    role: Literal["assistant"]
    content: str
    thinking: str = ""
    tool_calls: list[OllamaCallAnswer] = Field(default_factory=list)


class _Generated(BaseModel):
    model: str
    created_at: str
    logprobs: list[OllamaLogprob] = Field(default_factory=list)
    done: bool
    done_reason: Literal["stop", "length", "load", "unload"] | None = Field(
        default=None, description="With done: true."
    )
    total_duration: int | None = Field(default=None, description="Nanoseconds since the request came.")
    load_duration: int | None = Field(
        default=None, description="Of these, before the engine had the request: waiting for it, tokenizing."
    )
    prompt_eval_count: int | None = Field(default=None, description="Tokens of the prompt.")
    prompt_eval_duration: int | None = Field(
        default=None, description="From when the engine had the request to its first token."
    )
    eval_count: int | None = Field(default=None, description="Tokens generated.")
    eval_duration: int | None = Field(default=None, description="From the first token to the last.")


class OllamaChatAnswer(_Generated):
    """The answer of POST /api/chat, or a line of its stream; the last line has done: true."""

    message: OllamaMessageAnswer


class OllamaGenerateAnswer(_Generated):
    """The answer of POST /api/generate, or a line of its stream; the last line has done: true."""

    response: str
    thinking: str = ""
    context: list[int] | None = Field(default=None, description="Prompt and answer, to go on behind.")


class OllamaEmbedAnswer(BaseModel):
    """The answer of POST /api/embed."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaEmbeddingsAnswer(BaseModel):
    """The answer of POST /api/embeddings."""

    embedding: list[float]


class OllamaDetails(BaseModel):
    """What kind of model it is; what is not known is empty."""

    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(BaseModel):
    """A model that is served."""

    name: str
    model: str
    modified_at: str
    size: int = Field(description="Bytes of the weights' files.")
    digest: str
    details: OllamaDetails


class OllamaModels(BaseModel):
    """The answer of GET /api/tags."""

    models: list[OllamaModel]


class OllamaRunningModel(BaseModel):
    """A model that the engine has."""

    name: str
    model: str
    size: int
    digest: str
    details: OllamaDetails
    expires_at: str
    size_vram: int
    context_length: int


class OllamaRunningModels(BaseModel):
    """The answer of GET /api/ps."""

    models: list[OllamaRunningModel]


class OllamaShowAnswer(BaseModel):
    """The answer of POST /api/show."""

    model_config = ConfigDict(protected_namespaces=())

    modelfile: str
    parameters: str
    template: str = Field(description="In Jinja, not in Go's template language.")
    details: OllamaDetails
    model_info: dict[str, str | int | float | None]
    capabilities: list[Literal["completion", "embedding", "tools", "thinking"]]
    modified_at: str


class OllamaVersion(BaseModel):
    """The answer of GET /api/version."""

    version: str


class OllamaStatus(BaseModel):
    """The answer of POST /api/pull."""

    status: Literal["success"]
