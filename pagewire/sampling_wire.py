"""Sampling parameters as they arrive in protobuf messages."""

from __future__ import annotations

from typing import Any

from pagewire.inference.v1 import inference_pb2


def given_fields(sampling: inference_pb2.SamplingParams) -> dict[str, Any]:
    """The fields that the sender set, by SamplingParams field. (The two plain booleans cannot be told from
    unset when false.)
    """
    given: dict[str, Any] = {}
    for descriptor, value in sampling.ListFields():
        if descriptor.name == "logit_bias":
            value = dict(value)
        elif descriptor.is_repeated:
            value = tuple(value)
        given[descriptor.name] = value
    return given
