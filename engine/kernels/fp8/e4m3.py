"""Numbers of e4m3, float8_e4m3fn in torch (arXiv:2209.05433), inside kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.launch import settle_keys

# The largest number, and the least scale: a group of zeros has it.
LARGEST = 448.0
SMALLEST_SCALE = 1e-12
_LARGEST = tl.constexpr(LARGEST)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)


@triton.jit
def scale_of(largest):
    """The scale of numbers of which this is the largest magnitude."""
    return tl.maximum(largest / _LARGEST, _SMALLEST_SCALE)


@triton.jit
def to_fp8(values, scales):
    """fp32 -> e4m3; what is too large becomes the largest. Multiplied by the scale's inverse, since a
    division takes several times as long."""
    inverse = 1.0 / scales
    return tl.minimum(tl.maximum(values * inverse, -_LARGEST), _LARGEST).to(tl.float8e4nv)


@triton.jit
def rounded(values, scales):
    """What `to_fp8` makes of values none of which is too large, in fp32."""
    inverse = 1.0 / scales
    return (values * inverse).to(tl.float8e4nv).to(tl.float32)


settle_keys(scale_of, to_fp8, rounded)
