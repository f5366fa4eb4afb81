"""Bodies of infer and of its answers: JSON, with the bytes of binary tensors behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from frontend.http.body import parse
from frontend.http.triton.bodies import InferBody, Parameters, TensorBody
from frontend.triton.model import VERSION
from frontend.triton.request import InferRequest
from frontend.triton.responses import Response
from frontend.triton.tensors import Tensor, from_bytes, from_values, to_bytes
from pagewire.base.errors import InvalidRequest

JSON_LENGTH_HEADER = "Inference-Header-Content-Length"
"""How many bytes of a body are JSON, if not all are."""

_UNSERVED_PARAMETERS = ("shared_memory_region", "classification")


def read_infer(model: str, headers: Mapping[str, str], data: bytes) -> tuple[InferRequest, frozenset[str]]:
    """A request for inference, and the outputs that are wanted as JSON ("*" for all).

    Raises:
        InvalidRequest: it is no such request.
    """
    end = _json_length(headers.get(JSON_LENGTH_HEADER), len(data))
    body = parse(InferBody, data[:end])
    tensors = _tensors(body, data[end:])
    outputs = body.outputs or []
    for wanted in outputs:
        _check_parameters(f"output {wanted.name}", wanted.parameters)
    parameters = body.parameters or {}
    binary = parameters.get("binary_data_output") is True
    as_json = [each.name for each in outputs if not (each.parameters or {}).get("binary_data", binary)]
    asked = InferRequest(
        model=model,
        id=body.id or "",
        tensors=tensors,
        parameters=parameters,
        outputs=[each.name for each in outputs],
    )
    return asked, frozenset(as_json if outputs or binary else ("*",))


def infer_answer(
    asked: InferRequest, response: Response, parameters: Mapping[str, Any], as_json: frozenset[str]
) -> web.Response:
    """The answer: JSON, and behind it the bytes of those outputs that are not wanted as JSON."""
    answer: dict[str, Any] = {"model_name": asked.model, "model_version": VERSION}
    if asked.id:
        answer["id"] = asked.id
    answer |= {"parameters": dict(parameters), "outputs": []}
    binary = b""
    for tensor in response.outputs:
        output: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
        }
        if tensor.name in as_json or "*" in as_json:
            output["data"] = list(tensor.values)
        else:
            data = to_bytes(tensor)
            binary += data
            output["parameters"] = {"binary_data_size": len(data)}
        answer["outputs"].append(output)
    head = json.dumps(answer, ensure_ascii=False).encode()
    if not binary:
        return web.Response(body=head, content_type="application/json")
    return web.Response(
        body=head + binary,
        content_type="application/octet-stream",
        headers={JSON_LENGTH_HEADER: str(len(head))},
    )


def _json_length(header: str | None, length: int) -> int:
    if header is None:
        return length
    if not (header.isascii() and header.isdigit() and len(header) < 20 and int(header) <= length):
        raise InvalidRequest(
            f"{JSON_LENGTH_HEADER} is {header!r}; it must be a whole number of bytes, at most the {length} "
            "of the body"
        )
    return int(header)


def _tensors(body: InferBody, binary: bytes) -> list[Tensor]:
    """The inputs. Those without data in JSON take theirs, one after another, from the bytes behind it."""
    tensors: list[Tensor] = []
    for given in body.inputs:
        _check_parameters(f"input {given.name}", given.parameters)
        if given.data is not None:
            tensors.append(from_values(given.name, given.datatype, given.shape, given.data))
            continue
        size = _binary_size(given)
        if size > len(binary):
            raise InvalidRequest(
                f"input {given.name} has {size} bytes, but {len(binary)} are left of the body",
                param=given.name,
            )
        tensors.append(from_bytes(given.name, given.datatype, given.shape, binary[:size]))
        binary = binary[size:]
    if binary:
        raise InvalidRequest(f"the body has {len(binary)} bytes behind those of its inputs")
    return tensors


def _binary_size(given: TensorBody) -> int:
    size = (given.parameters or {}).get("binary_data_size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise InvalidRequest(
            f"input {given.name} has neither data nor a binary_data_size that is a number of bytes",
            param=given.name,
        )
    return size


def _check_parameters(what: str, parameters: Parameters | None) -> None:
    for name in _UNSERVED_PARAMETERS:
        if (parameters or {}).get(name):
            raise InvalidRequest(f"{what} has the parameter {name}, which is not supported by this server")
