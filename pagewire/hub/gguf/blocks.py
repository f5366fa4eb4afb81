"""The formats of GGUF files whose blocks a converted checkpoint keeps as they are.

A matrix in blocks is a tensor of bytes [rows, bytes of a row] in model.safetensors, whose metadata name its
format under METADATA_KEY: JSON, tensor name -> format.
"""

from __future__ import annotations

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

METADATA_KEY = "gguf_blocks"
# Those that processors compute on without unpacking them first.
KEPT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


def block_size(kind: str) -> tuple[int, int]:
    """Values of a block, and the bytes that they take (https://github.com/ggml-org/ggml, ggml-common.h)."""
    values, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(values), int(num_bytes)
