"""Requests for inference, in the pipeline's form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from frontend.caller import client_of
from frontend.generation.request import GenerationRequest, TextPrompt, check_request_id
from frontend.triton.inputs import INPUTS, OUTPUTS, InputValues
from frontend.triton.model import ALIASES
from frontend.triton.tensors import Tensor, from_values
from pagewire.base.errors import InvalidRequest
from pagewire.wire.sampling_params import BeamSearch, SamplingParams, StructuredOutput

_PROTOCOL_PARAMETERS = frozenset(
    ("sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "binary_data_output", "headers")
)
"""Parameters of requests that are the protocol's own. The `priority` is that of models with levels of it,
which this one has not."""

_MICROSECONDS = range(2**63)

_LOGITS = ("context_logits", "generation_logits")


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """What a client sent, over either protocol.

    Attributes:
        model: the name it asked for.
        id: its own name for the request, told in the answer; may be empty.
        tensors: the inputs.
        parameters: of the request.
        outputs: the outputs that are wanted; none for all there are.
    """

    model: str
    id: str
    tensors: Sequence[Tensor]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    outputs: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """A request that was understood.

    Attributes:
        asked: what the client sent.
        request: the same for the pipeline.
        stream: whether every delta is a response of its own.
        outputs: names of the outputs to send.
        empty_final: whether the last response of a stream has no outputs.
    """

    asked: InferRequest
    request: GenerationRequest
    stream: bool
    outputs: frozenset[str]
    empty_final: bool

    @property
    def has_beams(self) -> bool:
        return self.request.sampling.beam_search is not None


def read_inference(
    asked: InferRequest, *, request_id: str, streams: bool, remaining: float | None = None
) -> Inference:
    """Understands a request.

    Args:
        asked: what the client sent, for a model that there is.
        request_id: names the request in logs.
        streams: whether the answer may have several responses.
        remaining: seconds until the call's own deadline, if it has one.

    Raises:
        InvalidRequest: it cannot succeed as sent.
    """
    values = InputValues.read([*asked.tensors, *_from_parameters(asked)], asked.model)
    stream = values.flag("stream")
    if stream and not streams:
        raise InvalidRequest(
            "stream is true, but this call has one response; use generate_stream or gRPC's ModelStreamInfer",
            param="stream",
        )
    sampling = _sampling(values, asked.outputs)
    stream = stream and sampling.beam_search is None  # beams are known at the end
    request = GenerationRequest(
        request_id=request_id,
        model="" if asked.model in ALIASES else asked.model,
        prompts=[TextPrompt(text=text) for text in values.texts],
        sampling=sampling,
        client=client_of(None),
        timeout=_timeout(asked.parameters, remaining),
        echo=not (stream or values.flag("exclude_input_in_output")),
    )
    return Inference(
        asked=asked,
        request=request,
        stream=stream,
        outputs=_outputs(asked, values, request),
        empty_final=asked.parameters.get("triton_enable_empty_final_response") is True,
    )


def id_for_logs(given: str) -> str:
    """A client's name for its request as far as it can stand in logs and headers, else a drawn one."""
    try:
        return check_request_id(given)
    except InvalidRequest:
        return check_request_id(None)


def tensor_of(name: str, value: object) -> Tensor:
    """An input that came as a plain JSON value or a list of such.

    Raises:
        InvalidRequest: there is no such input, or it is of another type.
    """
    known = INPUTS.get(name)
    if known is None:
        raise InvalidRequest(f"Unrecognized request argument supplied: {name}", param=name)
    values = value if isinstance(value, list) else [value]
    return from_values(name, known.datatype, (len(values),), values)


def _from_parameters(asked: InferRequest) -> list[Tensor]:
    """The inputs among the parameters, which mean the same there."""
    return [
        tensor_of(name, value)
        for name, value in asked.parameters.items()
        if name not in _PROTOCOL_PARAMETERS and not name.startswith("triton_") and value is not None
    ]


def _sampling(values: InputValues, outputs: Sequence[str]) -> SamplingParams:
    """How to sample, with TensorRT-LLM's defaults: greedily, unless top_k or top_p is there.

    Raises:
        InvalidRequest: a value is out of its range.
    """
    max_tokens = values.one("max_tokens")
    if max_tokens < 1:
        raise InvalidRequest(f"max_tokens is {max_tokens}; it must be at least 1", param="max_tokens")
    given: dict[str, Any] = {
        "max_tokens": max_tokens,
        "min_tokens": values.one("min_tokens", "min_length"),
        "seed": _signed(values.one("seed", "random_seed")),
        "repetition_penalty": values.one("repetition_penalty"),
        "presence_penalty": values.one("presence_penalty"),
        "frequency_penalty": values.one("frequency_penalty"),
        "stop": values.words("stop_words"),
        "bad_words": values.words("bad_words"),
        "structured_output": _constraint(values),
        **_candidates(values),
        **_beams(values),
    }
    if values.flag("return_log_probs") or not {"cum_log_probs", "output_log_probs"}.isdisjoint(outputs):
        given["logprobs"] = 0
    end_id = values.one("end_id")
    if end_id is not None:
        given["ignore_eos"] = given["structured_output"] is None
        given["stop_token_ids"] = (end_id,) if end_id >= 0 else ()
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def _candidates(values: InputValues) -> dict[str, Any]:
    """Temperature, top_k and top_p. Where both of these are 0 or missing, the likeliest token is taken."""
    temperature, top_k, top_p = values.one("temperature"), values.one("top_k"), values.one("top_p")
    if not top_k and not top_p:
        SamplingParams(temperature=1.0 if temperature is None else temperature)  # checked all the same
        return {"temperature": 0.0}
    return {"temperature": temperature, "top_k": top_k, "top_p": top_p or None}


def _beams(values: InputValues) -> dict[str, Any]:
    width, returned = values.one("beam_width"), values.one("num_return_sequences")
    if width is None or width == 1:
        return {"n": returned}
    search = BeamSearch(width=width, length_penalty=values.one("length_penalty") or 0.0, early_stopping=True)
    return {"n": width if returned is None else returned, "beam_search": search}


def _constraint(values: InputValues) -> StructuredOutput | None:
    """What TensorRT-LLM calls guided decoding."""
    kind, guide = values.one("guided_decoding_guide_type"), values.one("guided_decoding_guide")
    if kind in (None, ""):
        return None
    if kind == "json":
        return StructuredOutput(json_object=True)
    fields = {"json_schema": "json_schema", "regex": "regex", "ebnf_grammar": "grammar"}
    if kind not in fields:
        raise InvalidRequest(
            f"guided_decoding_guide_type is {kind!r}; it must be json, {', '.join(fields)}",
            param="guided_decoding_guide_type",
        )
    if not guide:
        raise InvalidRequest(
            f"guided_decoding_guide_type is {kind!r}, which needs guided_decoding_guide",
            param="guided_decoding_guide",
        )
    return StructuredOutput(**{fields[kind]: guide})


def _signed(seed: int | None) -> int | None:
    """A seed of 64 bits as the signed number that the sampler takes."""
    return seed - 2**64 if seed is not None and seed >= 2**63 else seed


def _timeout(parameters: Mapping[str, Any], remaining: float | None) -> float | None:
    """Seconds: the sooner of the parameter, in microseconds, and the call's deadline."""
    if remaining is not None and math.isinf(remaining):
        remaining = None
    given = parameters.get("timeout")
    if given is None or given == 0:
        return remaining
    if not isinstance(given, int) or isinstance(given, bool) or given not in _MICROSECONDS:
        raise InvalidRequest(
            f"timeout is {given!r}; it must be a whole number of microseconds, from 0 to {_MICROSECONDS[-1]}",
            param="timeout",
        )
    seconds = given / 1e6
    return seconds if remaining is None else min(seconds, remaining)


def _outputs(asked: InferRequest, values: InputValues, request: GenerationRequest) -> frozenset[str]:
    """The outputs that were asked for, or those there are."""
    for name in asked.outputs:
        if name in _LOGITS:
            raise InvalidRequest(f"output {name} is not supported by this server; leave it out", param=name)
        if name not in OUTPUTS:
            raise InvalidRequest(
                f"unexpected inference output {name!r} for model {asked.model!r}; "
                f"it has {', '.join(OUTPUTS)}",
                param=name,
            )
    if asked.outputs:
        return frozenset(asked.outputs)
    wanted = {
        "text_output": True,
        "cum_log_probs": values.flag("return_log_probs"),
        "output_log_probs": values.flag("return_log_probs"),
        "sequence_index": request.sampling.n > 1,
        "batch_index": len(request.prompts) > 1,
        "num_input_tokens": values.flag("return_num_input_tokens"),
        "num_output_tokens": values.flag("return_num_output_tokens"),
    }
    return frozenset(name for name, is_wanted in wanted.items() if is_wanted)
