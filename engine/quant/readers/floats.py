"""The descriptions of FP8 and bitsandbytes."""

from __future__ import annotations

from engine.quant.config import Quantization, SchemeRule
from engine.quant.excluded import ExcludedModules
from engine.quant.fields import QuantFields
from engine.quant.schemes import Activations, BnbInt8, BnbTable, Fp8, Scheme


def read_fp8(fields: QuantFields) -> Quantization:
    """Raises ConfigError for another format than e4m3, and for static activations with blocks."""
    fields.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    fields.choice("scale_fmt", ("float",), "float")
    activations = fields.choice("activation_scheme", ("dynamic", "static"), "dynamic")
    block = read_block(fields, "weight_block_size")
    if block is None:
        kind = Activations.TOKEN if activations == "dynamic" else Activations.TENSOR
        scheme = Fp8("tensor", kind)
    elif activations == "static":
        raise fields.error("activation_scheme is 'static' with blocks", "supported with blocks is dynamic")
    else:
        scheme = Fp8("block", Activations.GROUP, block)
    of_what = "a scale a matrix" if block is None else f"blocks of {block[0]} x {block[1]}"
    excluded = [*fields.names("modules_to_not_convert"), *fields.names("ignored_layers"), "lm_head"]
    return Quantization(
        "fp8",
        f"fp8, {of_what}, activations {activations}",
        (SchemeRule(scheme, everything=True),),
        ExcludedModules(excluded, fields.source),
    )


def read_block(fields: QuantFields, name: str) -> tuple[int, int] | None:
    """Outputs and inputs of a block of weights with one scale; None where the field is missing or null."""
    block = fields.get(name)
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(_is_side(side) for side in block):
        raise fields.error(f"{name} is {block!r}", "it must be two multiples of 8, such as [128, 128]")
    return block[0], block[1]


def _is_side(side: object) -> bool:
    return type(side) is int and 0 < side <= 2**16 and side % 8 == 0


def read_bitsandbytes(fields: QuantFields) -> Quantization:
    """Raises ConfigError for what stores 4-bit weights otherwise than in bytes."""
    skipped = [*fields.names("llm_int8_skip_modules"), "lm_head"]
    scheme: Scheme
    if fields.flag("load_in_4bit", "_load_in_4bit", default=False):
        kind = fields.choice("bnb_4bit_quant_type", ("nf4", "fp4"), "fp4")
        fields.choice("bnb_4bit_quant_storage", ("uint8",), "uint8")
        scheme = BnbTable(nested=fields.flag("bnb_4bit_use_double_quant", default=False))
        summary = f"bitsandbytes, {kind}{', double quantization' if scheme.nested else ''}"
    elif fields.flag("load_in_8bit", "_load_in_8bit", default=False):
        scheme, summary = BnbInt8(), "bitsandbytes, int8"
    else:
        raise fields.error("neither load_in_4bit nor load_in_8bit is true", "one of them must be")
    rules = (SchemeRule(scheme, everything=True),)
    return Quantization("bitsandbytes", summary, rules, ExcludedModules(skipped, fields.source))
