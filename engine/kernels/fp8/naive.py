"""The definition of quantization to e4m3 and of the products of this folder, in fp64."""

from __future__ import annotations

import torch

from engine.kernels.fp8.e4m3 import LARGEST, SMALLEST_SCALE
from engine.kernels.fp8.matrix import Fp8Matrix


def naive_quantize(
    x: torch.Tensor, group: int, static_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] -> float8_e4m3fn [T, K] and the scale of each group of inputs, fp32 [ceil(K / group), T]: its
    largest magnitude over 448, or `static_scale`. What is too large becomes the largest."""
    num_tokens, in_features = x.shape
    groups = [x[:, begin : begin + group].float() for begin in range(0, in_features, group)]
    if static_scale is None:
        scales = torch.stack([(each.abs().amax(1) / LARGEST).clamp(min=SMALLEST_SCALE) for each in groups])
    else:
        scales = static_scale.float().expand(len(groups), num_tokens)
    codes = [
        (each * (1 / scale[:, None])).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float()
        for each, scale in zip(groups, scales, strict=True)
    ]
    return torch.cat(codes, 1).to(torch.float8_e4m3fn), scales


def naive_product(x: torch.Tensor, matrix: Fp8Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K] -> [T, N] in fp64, x quantized as the matrix says."""
    values = x.double()
    group = matrix.input_group
    if group:
        codes, scales = naive_quantize(x, group, matrix.input_scale)
        values = codes.double() * scales.double().T.repeat_interleave(group, 1)[:, : x.shape[1]]
    weight = matrix.codes.double() * spread_scales(matrix)
    product = values @ weight.T
    return product if bias is None else product + bias.double()


def spread_scales(matrix: Fp8Matrix) -> torch.Tensor:
    """The scale of each weight, in fp64, of a shape that broadcasts to [N, K]."""
    n, k = matrix.codes.shape
    if matrix.block is None:
        return matrix.scales.double().view(-1, 1)
    outputs, inputs = matrix.block
    return matrix.scales.double().repeat_interleave(outputs, 0)[:n].repeat_interleave(inputs, 1)[:, :k]
