"""The operands of this folder's products."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """Weights [N, K], and how inputs are quantized for them.

    Attributes:
        codes: float8_e4m3fn [N, K], contiguous.
        scales: fp32 [N], of each output; or with a block [ceil(N / block[0]), ceil(K / block[1])].
        block: outputs and inputs that share a scale; None for a scale an output.
        input_group: inputs of a token that are quantized by their own largest magnitude, K for a scale a
            token; 0 where inputs stay in the model's dtype.
        input_scale: fp32 [1], by which all inputs are quantized instead.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    block: tuple[int, int] | None = None
    input_group: int = 0
    input_scale: torch.Tensor | None = None
