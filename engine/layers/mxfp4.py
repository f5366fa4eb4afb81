"""MXFP4 experts, as gpt-oss's files have them: 4 bits for each weight, and a power of two for each 32.

A byte holds two neighbours along the input, the first in its low half: a sign and 2 bits of exponent and 1 of
mantissa (E2M1). Scales are exponents: 2 ** (byte - 127) (E8M0). From the OCP's Microscaling Formats (MX)
Specification 1.0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.layers.experts import ExpertShape, ExpertWeights
from engine.layers.linear_weight import FeatureDim, LinearWeight
from engine.layers.looped_experts import LoopedExperts, one_of

GROUP = 32
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES))
EXPONENT_BIAS = 127


class Mxfp4Experts(LoopedExperts):
    """Weights stay in 4 bits in memory. An expert's matrices are dequantized to the model's dtype whenever it
    has tokens: at load they would take four times the memory, which few hosts have."""

    def create_weights(self, weights: ExpertWeights, shape: ExpertShape) -> None:
        """Two parameters: blocks [E, N, K / 2] and scales [E, N, K / 32], both of bytes."""
        num_experts, matrix = shape.num_experts, shape.matrix
        in_blocks = FeatureDim(2, features=GROUP, elements=GROUP // 2)
        in_scales = FeatureDim(2, features=GROUP)
        for name, input, is_scale in (("blocks", in_blocks, False), ("scales", in_scales, True)):
            width = input.count(matrix.in_features)
            data = torch.empty(num_experts, matrix.out_features, width, dtype=torch.uint8)
            weight = LinearWeight.make(data, output=FeatureDim(1), input=input, is_scale=is_scale)
            weights.register_parameter(name, weight)

    def unstack(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Files have the bytes of each scale in a dimension of their own, [E, N, K / 32, 16]."""
        return tensor.flatten(2) if name == "blocks" and tensor.dim() == 4 else tensor

    def multiply(
        self, weights: ExpertWeights, expert: int, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        blocks, scales = weights.get_parameter("blocks")[expert], weights.get_parameter("scales")[expert]
        return F.linear(x, dequantize(blocks, scales, x.dtype), one_of(bias, expert))


def dequantize(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """blocks [..., K / 2] and scales [..., K / 32], bytes -> [..., K] in the dtype."""
    values = torch.tensor(VALUES, dtype=dtype, device=blocks.device)
    # Both values of each byte at once: half the look-ups.
    codes = torch.arange(256, device=blocks.device)
    pairs = torch.stack((values[codes & 15], values[codes >> 4]), dim=-1)
    weights = pairs[blocks.int()].view(*scales.shape, GROUP)
    exponents = (scales.int() - EXPONENT_BIAS).unsqueeze(-1)
    return torch.ldexp(weights, exponents).to(dtype).flatten(-2)
