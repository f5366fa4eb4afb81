"""The descriptions of AWQ, GPTQ, AutoRound and SqueezeLLM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from engine.quant.config import Quantization, SchemeRule
from engine.quant.excluded import ExcludedModules
from engine.quant.fields import QuantFields
from engine.quant.schemes import Awq, Gptq, Scheme, SqueezeLlm

_GPTQ_BITS = (2, 3, 4, 8)
_GPTQ_FORMATS = {"gptq": True, "gptq_v2": False}  # -> whether zero points are stored less one
_AUTO_ROUND_FORMATS = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
}
_OVERRIDES = frozenset(("bits", "group_size", "sym", "desc_act"))
_FULL_PRECISION_BITS = 16


def read_awq(fields: QuantFields) -> Quantization:
    """Raises ConfigError for another version than "gemm", and other bits than 4."""
    fields.bits("bits", "w_bit", allowed=(4,), default=4)
    fields.choice("version", ("gemm",), "gemm")
    scheme = Awq(
        fields.group_size("group_size", "q_group_size", default=128),
        fields.flag("zero_point", default=True),
    )
    excluded = [*fields.names("modules_to_not_convert"), "lm_head"]
    return Quantization(
        "awq",
        f"awq, 4 bits in {_groups(scheme.group_size)}",
        (SchemeRule(scheme, everything=True),),
        ExcludedModules(excluded, fields.source, substrings=True),
    )


def read_gptq(fields: QuantFields) -> Quantization:
    """Raises ConfigError for bits and formats that are not read, such as "marlin"."""
    if fields.flag("is_marlin_format", default=False):
        raise fields.error("is_marlin_format is true", "supported are the formats gptq and gptq_v2")
    name = "checkpoint_format" if fields.get("checkpoint_format") is not None else "format"
    stored_less_one = _GPTQ_FORMATS[fields.choice(name, tuple(_GPTQ_FORMATS), "gptq")]
    fields.choice("pack_dtype", ("int32",), "int32")
    scheme = replace(_gptq_scheme(fields), stored_less_one=stored_less_one)
    rules = (*_dynamic_rules(fields, scheme), SchemeRule(scheme, everything=True))
    excluded = [] if fields.flag("lm_head", default=False) else ["lm_head"]
    return Quantization("gptq", _gptq_summary(scheme), rules, ExcludedModules(excluded, fields.source))


def read_auto_round(fields: QuantFields) -> Quantization:
    """AutoRound writes the layout of GPTQ, or of AWQ. Raises ConfigError for its own ones."""
    packing = fields.choice("packing_format", tuple(_AUTO_ROUND_FORMATS), "auto_round:auto_gptq")
    if fields.get("data_type", default="int") != "int":
        raise fields.error(f"data_type is {fields.get('data_type')!r}", "supported is int")
    fields.bits("act_bits", allowed=(16, 32), default=16)
    scheme: Scheme
    if _AUTO_ROUND_FORMATS[packing] == "awq":
        fields.bits("bits", allowed=(4,))
        scheme = Awq(fields.group_size("group_size"))
    else:
        scheme = _gptq_scheme(fields)
    plain, others = [], []
    for module, own in fields.mapping("extra_config").items():
        if not isinstance(own, dict):
            raise fields.error(f"extra_config of {module} is {own!r}", "it must be an object")
        if own.get("bits", fields.get("bits")) == _FULL_PRECISION_BITS:
            plain.append(module)
        elif isinstance(scheme, Gptq):
            overridden = _gptq_scheme(replace(fields, values={**fields.values, **own}))
            others.append(SchemeRule(overridden, names=frozenset((module,))))
    summary = f"auto-round as {_AUTO_ROUND_FORMATS[packing]}, {fields.get('bits')} bits"
    rules = (*others, SchemeRule(scheme, everything=True))
    excluded = ExcludedModules([*plain, "lm_head"], fields.source)
    return Quantization("auto-round", summary, rules, excluded)


def read_squeezellm(fields: QuantFields) -> Quantization:
    """Raises ConfigError for other bits than 3 and 4."""
    scheme = SqueezeLlm(fields.bits("wbits", "bits", allowed=(3, 4), default=4))
    rules = (SchemeRule(scheme, everything=True),)
    summary = f"squeezellm, {scheme.bits} bits"
    return Quantization("squeezellm", summary, rules, ExcludedModules(["lm_head"], fields.source))


def _gptq_scheme(fields: QuantFields) -> Gptq:
    return Gptq(
        fields.bits("bits", allowed=_GPTQ_BITS),
        fields.group_size("group_size", default=128),
        symmetric=fields.flag("sym", default=True),
        desc_act=fields.flag("desc_act", default=False),
    )


def _gptq_summary(scheme: Gptq) -> str:
    kind = "" if scheme.symmetric else ", asymmetric"
    order = ", desc_act" if scheme.desc_act else ""
    return f"gptq, {scheme.bits} bits in {_groups(scheme.group_size)}{kind}{order}"


def _dynamic_rules(fields: QuantFields, scheme: Gptq) -> list[SchemeRule]:
    """GPTQModel's `dynamic`: regular expressions, "-:" before one leaves modules in full precision, "+:" or
    nothing gives them other settings."""
    entries = fields.mapping("dynamic").items()
    return [_dynamic_rule(fields, scheme, entry, own) for entry, own in entries]


def _dynamic_rule(fields: QuantFields, scheme: Gptq, entry: str, own: Any) -> SchemeRule:
    sign, pattern = (entry[:2], entry[2:]) if entry[:2] in ("-:", "+:") else ("", entry)
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise fields.error(f"dynamic has {entry!r}", f"that is not a regular expression: {error}") from error
    if sign == "-:":
        return SchemeRule(None, patterns=(compiled,))
    overrides: Mapping[str, Any] = own if isinstance(own, dict) else {}
    unknown = overrides.keys() - _OVERRIDES
    if unknown:
        allowed = f"supported are {', '.join(sorted(_OVERRIDES))}"
        raise fields.error(f"dynamic changes {', '.join(sorted(unknown))} of {entry!r}", allowed)
    changed = _gptq_scheme(replace(fields, values={**fields.values, **overrides}))
    return SchemeRule(replace(changed, stored_less_one=scheme.stored_less_one), patterns=(compiled,))


def _groups(group_size: int) -> str:
    return f"groups of {group_size}" if group_size else "one group"
