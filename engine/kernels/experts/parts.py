"""What the products of experts have in common: gated activations, and weights of 4 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.activate_and_mul.kernel import activate
from engine.kernels.launch import settle_keys

# Weights of a scale, and bytes that hold them.
GROUP = 32
GROUP_BYTES = tl.constexpr(16)


@dataclass(frozen=True, slots=True)
class ExpertMatrices:
    """A matrix of each expert.

    Attributes:
        weight: [E, N, K], contiguous; of MXFP4, bytes [E, N, K / 2], of which each holds two neighbours along
            K, the first in its low half.
        scales: of MXFP4, exponents plus 127, bytes [E, N, K / 32]; None for plain weights.
        bias: [E, N].
    """

    weight: torch.Tensor
    scales: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def in_features(self) -> int:
        """K."""
        return self.weight.shape[2] * (1 if self.scales is None else 2)


@dataclass(frozen=True, slots=True)
class Gating:
    """What is made of gate and up; see naive.py."""

    kind: str = "silu"
    alpha: float = 1.0
    limit: float = 0.0


@triton.jit
def gated(gate, up, KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """In fp32."""
    if KIND == "clamped":
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return gate * tl.sigmoid(ALPHA * gate) * (up + 1.0)
    return activate(gate, KIND) * up


@triton.jit
def e2m1_values(codes):
    """int32, whose low 4 bits are a sign, 2 bits of exponent and 1 of mantissa -> fp32."""
    magnitude = codes & 7
    # From 1 on exponent and mantissa lie as in fp32, with another bias; below there are 0 and 0.5.
    bits = tl.where(magnitude > 1, (magnitude << 22) + 0x3F000000, magnitude * 0x3F000000)
    return (bits | ((codes & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_values(exponents):
    """int32 from 0 to 254 -> 2 ** (exponent - 127) in fp32. The least one is half of fp32's least normal."""
    return tl.where(exponents == 0, 0x00400000, exponents << 23).to(tl.float32, bitcast=True)


@triton.jit
def mxfp4_values(packed, exponents, N: tl.constexpr, BYTES: tl.constexpr):
    """Bytes [N, BYTES] and exponents [N, BYTES / 16] -> [N, 2 * BYTES] in fp32."""
    codes = packed.to(tl.int32)
    values = tl.join(e2m1_values(codes), e2m1_values(codes >> 4))  # [N, BYTES, 2]
    values = tl.reshape(values, (N, BYTES // GROUP_BYTES, 2 * GROUP_BYTES))
    values *= e8m0_values(exponents.to(tl.int32))[:, :, None]
    return tl.reshape(values, (N, 2 * BYTES))


settle_keys(activate, gated, e2m1_values, e8m0_values, mxfp4_values)
