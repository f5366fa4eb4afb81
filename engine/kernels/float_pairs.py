"""Two 16-bit floats that lie in one word of 32 bits, as kernels load them."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.launch import settle_keys


@triton.jit
def pair_floats(pairs, dtype: tl.constexpr):
    """int32 words -> (lower halves, upper halves), floats of `dtype`, in fp32."""
    if dtype == tl.bfloat16:
        low = (pairs << 16).to(tl.float32, bitcast=True)
        high = (pairs & -65536).to(tl.float32, bitcast=True)
    else:
        low = (pairs & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        high = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return low, high


settle_keys(pair_floats)
