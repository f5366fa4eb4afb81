"""The formats of GGUF files whose blocks a converted checkpoint keeps as they are.

A matrix in blocks is a tensor of bytes [rows, bytes of a row] in model.safetensors, whose metadata name its
format under METADATA_KEY: JSON, tensor name -> format.
"""

from __future__ import annotations

METADATA_KEY = "gguf_blocks"
# Those that processors compute on without unpacking them first.
_SIZES = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
KEPT = tuple(_SIZES)


def block_size(kind: str) -> tuple[int, int]:
    """Values of a block, and the bytes that they take (https://github.com/ggml-org/ggml, ggml-common.h)."""
    return _SIZES[kind]
