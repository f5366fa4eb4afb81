"""The description of compressed-tensors, which llm-compressor writes."""

from __future__ import annotations

import re

from engine.quant.config import Quantization, SchemeRule
from engine.quant.excluded import ExcludedModules
from engine.quant.fields import QuantFields
from engine.quant.readers.floats import read_block
from engine.quant.schemes import Activations, Fp8, Int8, PackedInts, Scheme

_PACKED, _INT8, _FP8 = "pack-quantized", "int-quantized", "float-quantized"
_FORMATS = (_PACKED, _INT8, _FP8, "naive-quantized")
_MIXED = "mixed-precision"
_LINEAR_CLASSES = ("Linear", "LinearBase")


def read_compressed_tensors(fields: QuantFields) -> Quantization:
    """Raises ConfigError for formats, bits and activations that are not read, naming each."""
    format_of_all = fields.choice("format", (*_FORMATS, _MIXED, "dense"), "dense")
    status = fields.get("quantization_status", default="compressed")
    if status != "compressed":
        raise fields.error(f"quantization_status is {status!r}", "only compressed checkpoints are read")
    for name in ("sparsity_config", "transform_config"):
        value = fields.mapping(name)
        if value and value != {"config_groups": {}} and value.get("format") != "dense":
            raise fields.error(f"{name} is set", "sparse and transformed weights are not read")
    groups = fields.inner("config_groups")
    if groups is None or not groups.values:
        raise fields.error("config_groups is missing", "it must say how layers are quantized")
    rules, summaries = [], []
    for name in groups.values:
        group = groups.inner(name)
        if group is None:
            raise groups.error(f"{name} is null", "it must be an object")
        scheme, summary = _read_group(group, format_of_all)
        rules.append(_rule(group, scheme))
        summaries.append(summary)
    summary = f"compressed-tensors, {' and '.join(dict.fromkeys(summaries))}"
    excluded = ExcludedModules(fields.names("ignore"), fields.source)
    return Quantization("compressed-tensors", summary, tuple(rules), excluded)


def _rule(group: QuantFields, scheme: Scheme) -> SchemeRule:
    targets = group.names("targets")
    patterns = []
    for target in targets:
        if target.startswith("re:"):
            try:
                patterns.append(re.compile(target.removeprefix("re:")))
            except re.error as error:
                raise group.error(f"targets has {target!r}", f"it is malformed: {error}") from error
    return SchemeRule(
        scheme,
        names=frozenset(target for target in targets if not target.startswith("re:")),
        patterns=tuple(patterns),
        everything=any(target in _LINEAR_CLASSES for target in targets),
    )


def _read_group(group: QuantFields, format_of_all: str) -> tuple[Scheme, str]:
    weights, inputs = group.inner("weights"), group.inner("input_activations")
    if weights is None:
        raise group.error("weights is null", "quantized activations of plain weights are not supported")
    if group.get("output_activations") is not None:
        raise group.error("output_activations is set", "quantized outputs are not supported")
    if weights.flag("dynamic", default=False):
        raise weights.error("dynamic is true", "weights must be static")
    kind, own_format = weights.choice("type", ("int", "float"), "int"), group.get("format")
    stored_as = own_format if own_format is not None else format_of_all
    if stored_as not in _FORMATS:
        raise group.error(f"format {stored_as!r} is not supported", f"supported are {', '.join(_FORMATS)}")
    if kind == "float":
        return _read_fp8(weights, inputs)
    if stored_as == _PACKED:
        return _read_packed(weights, inputs)
    return _read_int8(weights, inputs)


def _read_packed(weights: QuantFields, inputs: QuantFields | None) -> tuple[Scheme, str]:
    bits = weights.bits("num_bits", allowed=(4, 8))
    if inputs is not None:
        described = f"{inputs.get('num_bits')}-bit inputs with packed {bits}-bit weights"
        raise inputs.error(f"{described} are not supported", "supported are inputs that are not quantized")
    strategy = weights.choice("strategy", ("group", "channel"), "channel")
    group_size = weights.group_size("group_size") if strategy == "group" else 0
    order = weights.get("actorder")
    if order not in (None, False, True, "group", "weight", "static", "dynamic"):
        raise weights.error(f"actorder is {order!r}", "supported are group, weight and null")
    ordered = order in ("group", "dynamic", True)
    symmetric = weights.flag("symmetric", default=True)
    groups = f"groups of {group_size}" if group_size else "channels"
    kind = "" if symmetric else ", asymmetric"
    return PackedInts(bits, group_size, symmetric, ordered), f"{bits} bits in {groups}{kind}"


def _read_int8(weights: QuantFields, inputs: QuantFields | None) -> tuple[Scheme, str]:
    weights.bits("num_bits", allowed=(8,))
    strategy = weights.choice("strategy", ("channel", "tensor"), "channel")
    if not weights.flag("symmetric", default=True):
        raise weights.error("symmetric is false", "int-quantized weights must be symmetric")
    activations, described = _read_inputs(inputs, "int")
    symmetric = inputs is None or inputs.flag("symmetric", default=True)
    if not symmetric and activations is not Activations.TENSOR:
        assert inputs is not None
        raise inputs.error("symmetric is false", "asymmetric inputs are supported where they are static")
    scheme = Int8(strategy == "tensor", activations, zero_point=not symmetric)
    return scheme, f"int8 by {strategy}, {described}"


def _read_fp8(weights: QuantFields, inputs: QuantFields | None) -> tuple[Scheme, str]:
    weights.bits("num_bits", allowed=(8,))
    strategy = weights.choice("strategy", ("channel", "tensor", "block"), "tensor")
    if strategy != "block":
        activations, described = _read_inputs(inputs, "float")
        return Fp8(strategy, activations), f"fp8 by {strategy}, {described}"
    block = read_block(weights, "block_structure")
    if block is None:
        raise weights.error("block_structure is missing", "it must be two numbers, such as [128, 128]")
    if inputs is None:
        return Fp8("block", Activations.NONE, block), f"fp8 in blocks of {block[0]} x {block[1]}"
    if not inputs.flag("dynamic", default=False) or inputs.group_size("group_size") != block[1]:
        allowed = "supported with blocks are dynamic groups of as many inputs as a block has"
        raise inputs.error("these activations are not supported", allowed)
    inputs.bits("num_bits", allowed=(8,))
    return Fp8("block", Activations.GROUP, block), f"fp8 in blocks of {block[0]} x {block[1]}, w8a8"


def _read_inputs(inputs: QuantFields | None, kind: str) -> tuple[Activations, str]:
    """How inputs are quantized: to 8 bits of the weights' kind, or not at all."""
    if inputs is None:
        return Activations.NONE, "inputs as they are"
    inputs.bits("num_bits", allowed=(8,))
    inputs.choice("type", (kind,), kind)
    if inputs.flag("dynamic", default=False):
        inputs.choice("strategy", ("token", "tensor"), "token")
        return Activations.TOKEN, "inputs by token"
    inputs.choice("strategy", ("tensor",), "tensor")
    return Activations.TENSOR, "inputs static"
