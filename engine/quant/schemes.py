"""How one matrix of a checkpoint is quantized, as its configuration says. No torch here: the command line
reads configurations before torch is imported.

A scheme says how a matrix lies in files. What it becomes in memory is one of a few layouts
(engine/quant/layouts), whatever the scheme.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Activations(Enum):
    """How the input of a product is quantized.

    NONE: not at all; the product is of the model's own dtype. TOKEN: each token by its own largest magnitude.
    TENSOR: all of it by one scale of the checkpoint. GROUP: each token's groups of as many inputs as a block
    of weights has, each by its own largest magnitude.
    """

    NONE = "none"
    TOKEN = "token"  # nosec B105 # no password
    TENSOR = "tensor"
    GROUP = "group"


@dataclass(frozen=True, slots=True)
class Awq:
    """AutoAWQ's "gemm": 4 bits, packed along the output.

    Attributes:
        group_size: inputs that share a scale; 0 for all of them.
        zero_point: whether files hold zero points; else each is 8.
    """

    group_size: int
    zero_point: bool = True


@dataclass(frozen=True, slots=True)
class Gptq:
    """AutoGPTQ's and GPTQModel's layout, packed along the input.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: inputs that share a scale; 0 for all of them.
        symmetric: whether every zero point is 2 ** (bits - 1).
        stored_less_one: whether files hold each zero point less one (checkpoint_format "gptq", the first
            version), or as it is ("gptq_v2").
        desc_act: whether inputs were quantized in an order of their own; files say which group each is in.
    """

    bits: int
    group_size: int
    symmetric: bool = True
    stored_less_one: bool = True
    desc_act: bool = False


@dataclass(frozen=True, slots=True)
class PackedInts:
    """compressed-tensors' "pack-quantized", computed with inputs of the model's dtype.

    Attributes:
        bits: 4 or 8.
        group_size: inputs that share a scale; 0 for all of them.
        symmetric: whether there are no zero points.
        ordered: whether files say which group each input is in (actorder "group").
    """

    bits: int
    group_size: int
    symmetric: bool = True
    ordered: bool = False


@dataclass(frozen=True, slots=True)
class Int8:
    """compressed-tensors' "int-quantized", the form of SmoothQuant's W8A8: int8 with a scale for each output,
    or one for all.

    Attributes:
        per_tensor: whether there is one scale.
        activations: NONE, TOKEN or TENSOR.
        zero_point: whether files hold a zero point of the inputs (activations TENSOR).
    """

    per_tensor: bool
    activations: Activations
    zero_point: bool = False


@dataclass(frozen=True, slots=True)
class Fp8:
    """float8_e4m3fn with scales that its values are multiplied with.

    Attributes:
        scales: what has a scale: "tensor", "channel" (each output) or "block".
        activations: NONE, TOKEN, TENSOR, or GROUP for blocks.
        block: outputs and inputs of a block.
    """

    scales: str
    activations: Activations
    block: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class BnbTable:
    """bitsandbytes' NF4 and FP4: 4 bits that number the entries of a table.

    Attributes:
        nested: whether the scales are quantized too (double quantization).
    """

    nested: bool


@dataclass(frozen=True, slots=True)
class BnbInt8:
    """bitsandbytes' LLM.int8: int8 with the largest magnitude of each output. Computed with inputs of the
    model's dtype, which is what LLM.int8 does with outliers alone."""


@dataclass(frozen=True, slots=True)
class SqueezeLlm:
    """SqueezeLLM: bits that number the entries of a table for each output, and outliers apart.

    Attributes:
        bits: 3 or 4.
    """

    bits: int


@dataclass(frozen=True, slots=True)
class AtLoad:
    """Plain weights that are quantized as they are loaded.

    Attributes:
        kind: "int8": a scale for each output. "int4": groups of 128 inputs (32 where they do not divide) with
            scale and zero point. Both round to nearest, and inputs stay in the model's dtype. "fp8": a scale
            for each output, and inputs quantized token by token.
    """

    kind: str


Scheme = Awq | Gptq | PackedInts | Int8 | Fp8 | BnbTable | BnbInt8 | SqueezeLlm | AtLoad
