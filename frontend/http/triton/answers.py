"""What the endpoints under /v2 answer, for /openapi.json; the tests hold the answers to these models."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, RootModel


class TritonErrorAnswer(BaseModel):
    """An error of an endpoint under /v2."""

    error: str


class ServerMetadataAnswer(BaseModel):
    """The answer of GET /v2."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """A tensor that a model takes or answers."""

    name: str
    datatype: str
    shape: list[int] = Field(description="-1 for what varies; the first is the batch.")


class ModelMetadataAnswer(BaseModel):
    """The answer of GET /v2/models/{model}."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelConfigAnswer(BaseModel):
    """The answer of GET /v2/models/{model}/config."""

    model_config = ConfigDict(protected_namespaces=())

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: list[dict[str, Any]]
    output: list[dict[str, Any]]
    model_transaction_policy: dict[str, bool]


class DurationAnswer(BaseModel):
    """How often something happened, and nanoseconds altogether."""

    count: int
    ns: int


class ModelStatisticsEntry(BaseModel):
    """What is counted of a model."""

    name: str
    version: str
    last_inference: int = Field(description="Milliseconds since 1970.")
    inference_count: int
    execution_count: int
    inference_stats: dict[str, DurationAnswer]


class StatisticsAnswer(BaseModel):
    """The answer of GET /v2/models/{model}/stats."""

    model_config = ConfigDict(protected_namespaces=())

    model_stats: list[ModelStatisticsEntry]


class IndexEntry(BaseModel):
    """A model of the repository."""

    name: str
    version: str
    state: str
    reason: str


class IndexAnswer(RootModel[list[IndexEntry]]):
    """The answer of POST /v2/repository/index."""


class GenerateAnswer(BaseModel):
    """The answer of generate, and of each event of generate_stream. An output of one element is that."""

    model_config = ConfigDict(protected_namespaces=())

    id: str | None = Field(default=None, description="The request's, if it had one.")
    model_name: str
    model_version: str
    sequence_id: int | str
    sequence_start: bool
    sequence_end: bool
    text_output: str | list[str]
    cum_log_probs: float | list[float] | None = Field(default=None, description="With return_log_probs.")
    output_log_probs: float | list[float] | None = Field(default=None, description="With return_log_probs.")
    sequence_index: int | list[int] | None = Field(default=None, description="Where there are several.")
    num_input_tokens: int | list[int] | None = Field(
        default=None, description="With return_num_input_tokens."
    )
    num_output_tokens: int | list[int] | None = Field(
        default=None, description="With return_num_output_tokens."
    )


class OutputAnswer(BaseModel):
    """An output."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] | None = Field(default=None, description="binary_data_size, if it is binary.")
    data: list[Any] | None = Field(default=None, description="Its elements, unless it is binary.")


class InferAnswer(BaseModel):
    """The answer of infer. With binary outputs, their bytes follow the JSON, whose length a header tells."""

    model_config = ConfigDict(protected_namespaces=())

    id: str | None = None
    model_name: str
    model_version: str
    parameters: dict[str, Any]
    outputs: list[OutputAnswer]
