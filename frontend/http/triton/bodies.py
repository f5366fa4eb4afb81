"""What the endpoints under /v2 take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, create_model

from frontend.http.body import Body
from frontend.triton.inputs import INPUTS
from frontend.triton.tensors import DATATYPES

Scalar = bool | int | float | str
Parameters = Annotated[
    dict[str, Scalar | None],
    Field(description="Of the request: timeout in microseconds, sequence_id, and inputs by their names."),
]

_KINDS: Mapping[str, Any] = {
    "BYTES": str | list[str] | None,
    "FP32": float | list[float] | None,
    "BOOL": bool | list[bool] | None,
    "INT32": int | list[int] | None,
    "UINT64": int | list[int] | None,
}


class GenerateFields(Body):
    """What a request to generate has besides the model's inputs."""

    id: str | None = None
    parameters: dict[str, Scalar | list[Scalar] | None] | None = None


_FIELDS: dict[str, Any] = {name: (_KINDS[known.datatype], None) for name, known in INPUTS.items()}

GenerateBody: type[GenerateFields] = create_model(
    "GenerateBody",
    __base__=GenerateFields,
    __doc__="POST /v2/models/{model}/generate: text_input, max_tokens and whatever else, here or in "
    "`parameters`. A list of one value is that value.",
    **_FIELDS,
)


class TensorBody(Body):
    """An input of an inference request."""

    name: str
    shape: Annotated[list[int], Field(max_length=8)]
    datatype: Annotated[str, Field(json_schema_extra={"enum": [*DATATYPES]})]
    parameters: Parameters | None = None
    data: Annotated[
        list[Any] | None,
        Field(
            description="The elements, in one list or nested. Without it, parameters.binary_data_size says "
            "how many bytes behind the JSON are this input's."
        ),
    ] = None


class RequestedOutputBody(Body):
    """An output that is wanted."""

    name: str
    parameters: Parameters | None = None


class InferBody(Body):
    """POST /v2/models/{model}/infer."""

    id: str | None = None
    parameters: Parameters | None = None
    inputs: list[TensorBody]
    outputs: list[RequestedOutputBody] | None = None


class IndexBody(Body):
    """POST /v2/repository/index."""

    ready: bool = False
