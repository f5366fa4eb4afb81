"""Logits as integers of the same order, and which entry of a distribution a uniform number falls on."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Low bits of a float32 that are the same in every logit of a type: leaving them out shortens bisections.
KEY_SHIFT = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}

NEGATIVE_INFINITY_KEY = tl.constexpr(-2139095041)  # order_key(-inf) before the shift
BELOW_ALL_KEYS = tl.constexpr(-2147483648)


@triton.jit
def order_key(x, SHIFT: tl.constexpr):
    """int32 of the same order as the float32 (upcast from a type whose low SHIFT bits are 0); -0 equals 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def key_value(key, SHIFT: tl.constexpr):
    """The float32 whose order_key is `key`."""
    ordered = key << SHIFT
    ordered = tl.where(key < 0, ordered | ((1 << SHIFT) - 1), ordered)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pick(mass, target, SIZE: tl.constexpr):
    """The first entry at which the cumulative mass, [SIZE] fp64, exceeds the target, and what of it is left.

    Never an entry without mass; the last one with mass where rounding leads past the end.
    """
    place = tl.arange(0, SIZE)
    cumulative = tl.cumsum(mass, 0)
    # A parallel sum may round up where nothing was added, so that such entries are left out by name.
    first = tl.min(tl.where((cumulative > target) & (mass > 0), place, SIZE), 0)
    last = tl.max(tl.where(mass > 0, place, 0), 0)
    chosen = tl.minimum(first, last)
    before = tl.sum(tl.where(place == chosen, cumulative - mass, 0.0), 0)
    return chosen, tl.maximum(target - before, 0.0)
