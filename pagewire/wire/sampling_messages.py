"""Sampling parameters to and from their protobuf message."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pagewire.inference.v1 import inference_pb2
from pagewire.wire.sampling_params import BeamSearch, SamplingParams, StructuredOutput


def given_fields(sampling: inference_pb2.SamplingParams) -> dict[str, Any]:
    """The fields that the sender set, by SamplingParams field. (The two plain booleans cannot be told from
    unset when false.)

    Raises:
        InvalidRequest: a nested message is wrong in itself.
    """
    given: dict[str, Any] = {}
    for descriptor, value in sampling.ListFields():
        if descriptor.name == "logit_bias":
            value = dict(value)
        elif descriptor.name == "structured_output":
            value = _structured_output(value)
        elif descriptor.name == "beam_search":
            value = BeamSearch(**{field.name: each for field, each in value.ListFields()})
        elif descriptor.is_repeated:
            value = tuple(value)
        given[descriptor.name] = value
    return given


def to_message(params: SamplingParams, names: Iterable[str] | None = None) -> inference_pb2.SamplingParams:
    """The message that says the same.

    Args:
        names: the fields to set; all of them by default.
    """
    if names is None:
        names = [field.name for field in inference_pb2.SamplingParams.DESCRIPTOR.fields]
    values = {name: getattr(params, name) for name in names}
    if values.get("structured_output"):
        values["structured_output"] = _structured_message(values["structured_output"])
    if values.get("beam_search"):
        beams: BeamSearch = values["beam_search"]
        values["beam_search"] = inference_pb2.BeamSearch(
            width=beams.width, length_penalty=beams.length_penalty, early_stopping=beams.early_stopping
        )
    return inference_pb2.SamplingParams(**values)


def _structured_output(message: inference_pb2.StructuredOutput) -> StructuredOutput:
    kind = message.WhichOneof("constraint")
    if kind is None:
        return StructuredOutput()
    value = getattr(message, kind)
    fields: dict[str, Any] = {kind: tuple(value.texts) if kind == "choices" else value}
    return StructuredOutput(**fields)


def _structured_message(structured: StructuredOutput) -> inference_pb2.StructuredOutput:
    if structured.choices:
        return inference_pb2.StructuredOutput(choices=inference_pb2.Texts(texts=structured.choices))
    return inference_pb2.StructuredOutput(
        json_object=structured.json_object or None,
        json_schema=structured.json_schema,
        regex=structured.regex,
        grammar=structured.grammar,
    )
