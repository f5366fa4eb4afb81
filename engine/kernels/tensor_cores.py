"""What the compiler does not do for products on the tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.launch import settle_keys

_COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def settled(sums):
    """The sums (fp32) of products whose first operand is computed, when the tensor cores are done with them.

    Sums that only the next product takes, Triton leaves in flight while the next operand is computed. The
    last one is still being read from registers then, and the compiler reuses those: with some tiles a part of
    the results was wrong, or NaN, on an H200 (Triton 3.6). A use of the sums in between has it wait.
    """
    if _COMPILED:
        sums = tl.inline_asm_elementwise(
            "mov.f32 $0, $1;", "=f,f", [sums], dtype=tl.float32, is_pure=True, pack=1
        )
    return sums


settle_keys(settled)
