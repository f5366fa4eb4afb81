"""Messages of Triton's service to and from requests and responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from frontend.generation.request import require_at_most
from frontend.triton.model import VERSION
from frontend.triton.request import InferRequest
from frontend.triton.responses import Response
from frontend.triton.tensors import Tensor, from_bytes, from_values, num_elements, to_bytes
from pagewire.base.errors import InvalidRequest
from pagewire.triton import triton_pb2 as pb

FINAL_PARAMETER = "triton_final_response"
"""Of a stream's responses: whether it is its request's last one."""

_CONTENTS = {
    # by datatype: the field of InferTensorContents
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
_UNSERVED_PARAMETERS = ("shared_memory_region", "classification")
_MAX_ENTRIES = 256
"""Of one kind in a request; the model has a few dozen tensors."""
_INT64_MAX = 2**63 - 1


def read_message(message: pb.ModelInferRequest) -> InferRequest:
    """A request for inference.

    Raises:
        InvalidRequest: a tensor contradicts itself, or there are far too many.
    """
    for field in ("inputs", "outputs", "parameters"):
        require_at_most(_MAX_ENTRIES, len(getattr(message, field)), field)
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise InvalidRequest(
            f"raw_input_contents has {len(raw)} entries for {len(message.inputs)} inputs; it must have one "
            "for each, or none at all",
            param="raw_input_contents",
        )
    for output in message.outputs:
        _check_parameters(f"output {output.name}", output.parameters)
    return InferRequest(
        model=message.model_name,
        id=message.id,
        tensors=[_tensor(given, raw[number] if raw else None) for number, given in enumerate(message.inputs)],
        parameters={name: _value(parameter) for name, parameter in message.parameters.items()},
        outputs=[output.name for output in message.outputs],
    )


def to_message(
    asked: InferRequest, response: Response, parameters: Mapping[str, Any]
) -> pb.ModelInferResponse:
    """A response."""
    message = pb.ModelInferResponse(
        model_name=asked.model,
        model_version=VERSION,
        id=asked.id,
        raw_output_contents=[to_bytes(tensor) for tensor in response.outputs],
    )
    for tensor in response.outputs:
        message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    for name, value in parameters.items():
        _set(message.parameters[name], value)
    return message


class StreamMessages:
    """Makes a stream's messages for one request's responses; each is written before the next is made."""

    def __init__(self, asked: InferRequest, parameters: Mapping[str, Any]) -> None:
        self._asked = asked
        self._parameters = parameters
        # Used again for every response that has only text, as nearly all have: a tenth of what one costs.
        self._plain = pb.ModelStreamInferResponse()
        text = Response((Tensor("text_output", "BYTES", (1,), ("",)),), is_final=False)
        self._plain.infer_response.CopyFrom(self._message(text))
        self._raw = self._plain.infer_response.raw_output_contents

    def of(self, response: Response) -> pb.ModelStreamInferResponse:
        """A response."""
        if len(response.outputs) == 1 and not response.is_final:
            tensor = response.outputs[0]
            if tensor.name == "text_output" and len(tensor.values) == 1:
                self._raw[0] = to_bytes(tensor)
                return self._plain
        return pb.ModelStreamInferResponse(infer_response=self._message(response))

    def _message(self, response: Response) -> pb.ModelInferResponse:
        return to_message(self._asked, response, {**self._parameters, FINAL_PARAMETER: response.is_final})


def _tensor(given: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> Tensor:
    name, datatype, shape = given.name, given.datatype, given.shape
    _check_parameters(f"input {name}", given.parameters)
    if raw is not None:
        if given.HasField("contents"):
            raise InvalidRequest(f"input {name} has contents, and raw_input_contents too", param=name)
        return from_bytes(name, datatype, shape, raw)
    num_elements(name, datatype, shape)
    field = _CONTENTS.get(datatype)
    if field is None:
        raise InvalidRequest(
            f"input {name} has the datatype {datatype}, which only raw_input_contents can hold", param=name
        )
    values = list(getattr(given.contents, field))
    return from_values(name, datatype, shape, _texts(name, values) if datatype == "BYTES" else values)


def _texts(name: str, values: Sequence[bytes]) -> list[str]:
    try:
        return [value.decode() for value in values]
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"input {name} has a text that is not UTF-8: {error}", param=name) from error


def _check_parameters(what: str, parameters: Mapping[str, pb.InferParameter]) -> None:
    for name in _UNSERVED_PARAMETERS:
        if name in parameters:
            raise InvalidRequest(f"{what} has the parameter {name}, which is not supported by this server")


def _value(parameter: pb.InferParameter) -> Any:
    kind = parameter.WhichOneof("parameter_choice")
    return None if kind is None else getattr(parameter, kind)


def _set(parameter: pb.InferParameter, value: bool | int | str) -> None:
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, str):
        parameter.string_param = value
    elif value > _INT64_MAX:
        parameter.uint64_param = value
    else:
        parameter.int64_param = value
