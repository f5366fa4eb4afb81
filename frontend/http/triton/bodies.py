"""What the endpoints under /v2 take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, cast

from pydantic import Field, create_model

from frontend.http.body import Body
from frontend.triton.inputs import INPUTS
from frontend.triton.tensors import DATATYPES, MAX_ELEMENTS

Scalar = bool | int | float | str
Parameters = Annotated[
    dict[str, Scalar | None],
    Field(description="Of the request: timeout in microseconds, sequence_id, and inputs by their names."),
]

_TYPES: Mapping[str, Any] = {"BYTES": str, "FP32": float, "BOOL": bool, "INT32": int, "UINT64": int}


class GenerateFields(Body):
    """What a request to generate has besides the model's inputs."""

    id: str | None = None
    parameters: dict[str, Scalar | list[Scalar] | None] | None = None


def _of_inputs() -> dict[str, Any]:
    """A field for each input: a value, or a list of them."""
    fields: dict[str, Any] = {}
    for name, known in INPUTS.items():
        kind = _TYPES[known.datatype]
        listed = Annotated[list[kind], Field(max_length=MAX_ELEMENTS)]
        fields[name] = (kind | listed | None, None)
    return fields


GenerateBody = cast(
    type[GenerateFields],
    create_model(
        "GenerateBody",
        __base__=GenerateFields,
        __doc__="POST /v2/models/{model}/generate: text_input, max_tokens and whatever else, here or in "
        "`parameters`. A list of one value is that value.",
        **_of_inputs(),
    ),
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
            description="The elements, in one list or nested. Without it, parameters.binary_data_size says how "
            "many bytes behind the JSON are this input's."
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
