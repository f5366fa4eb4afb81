"""float8_e4m3fn weights, with inputs of the same format or of the model's dtype (arXiv:2209.05433)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F

from engine.quant.layouts.base import Layout, same
from engine.quant.schemes import Activations

LARGEST = 448.0
_SMALLEST_SCALE = 1e-12


@dataclasses.dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Fp8Channels(Layout):
    """y[t, n] = sx[t] * scales[n] * (sum over k of qx[t, k] * codes[n, k]), where the sum is of fp32.

    Attributes:
        codes: float8_e4m3fn [N, K].
        scales: fp32 [N]; files with a scale a matrix have it repeated here.
        activations: NONE, where x stays in its dtype and sx is 1; TOKEN, where each token has its own scale,
            its largest magnitude over 448 (`quantize_groups`); TENSOR, where all have `input_scale`.
        input_scale: fp32 [1], for TENSOR.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    activations: Activations
    input_scale: torch.Tensor | None

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    def rows(self, begin: int, end: int) -> torch.Tensor:
        return self.codes[begin:end].float() * self.scales[begin:end, None]

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.activations is Activations.NONE:
            return super(Fp8Channels, self).multiply(x, bias)
        if self.input_scale is None:
            quantized, input_scales = quantize_groups(x, x.shape[1])
        else:
            quantized, input_scales = quantize_static(x, self.input_scale), self.input_scale
        left = quantized.float()
        parts = [left @ self.codes[begin:end].float().T for begin, end in self.tiles()]
        product = torch.cat(parts, dim=-1) * input_scales * self.scales
        return (product if bias is None else product + bias).to(x.dtype)

    def fits(self, other: Self) -> bool:
        return self.activations is other.activations and same(self.input_scale, other.input_scale)

    @classmethod
    def joined(cls, layouts: Sequence[Self]) -> Self:
        return dataclasses.replace(
            layouts[0],
            codes=_joined_bytes([layout.codes for layout in layouts]),
            scales=torch.cat([layout.scales for layout in layouts]),
        )


@dataclasses.dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Fp8Blocks(Layout):
    """W[n, k] = codes[n, k] * scales[n // block[0], k // block[1]] (DeepSeek-V3, arXiv:2412.19437).

    Attributes:
        codes: float8_e4m3fn [N, K].
        scales: fp32 [ceil(N / block[0]), ceil(K / block[1])].
        block: outputs and inputs that share a scale.
        activations: NONE, or GROUP: each token's groups of block[1] inputs have their own scale, the largest
            magnitude over 448 (`quantize_groups`). Sums over a block are of fp32, and so are those of blocks.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    block: tuple[int, int]
    activations: Activations

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    def rows(self, begin: int, end: int) -> torch.Tensor:
        outputs, inputs = self.block
        first = begin // outputs
        scales = self.scales[first : -(-end // outputs)].repeat_interleave(outputs, 0)
        scales = scales[begin - first * outputs : end - first * outputs]
        return self.codes[begin:end].float() * scales.repeat_interleave(inputs, 1)[:, : self.in_features]

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.activations is Activations.NONE:
            return super(Fp8Blocks, self).multiply(x, bias)
        quantized, scales = quantize_groups(x, self.block[1])
        values = quantized.float() * scales.repeat_interleave(self.block[1], 1)[:, : self.in_features]
        bias = None if bias is None else bias.float()
        return super(Fp8Blocks, self).multiply(values, bias).to(x.dtype)

    def fits(self, other: Self) -> bool:
        """Blocks begin anew in each matrix, so this one must end with a whole one."""
        same_kind = self.block == other.block and self.activations is other.activations
        return same_kind and self.out_features % self.block[0] == 0

    @classmethod
    def joined(cls, layouts: Sequence[Self]) -> Self:
        return dataclasses.replace(
            layouts[0],
            codes=_joined_bytes([layout.codes for layout in layouts]),
            scales=torch.cat([layout.scales for layout in layouts]),
        )


def quantize_groups(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] -> float8_e4m3fn [T, K] and the scale of each group of inputs, fp32 [T, ceil(K / group_size)].
    With a group of K inputs that is a scale a token."""
    values = x.float()
    missing = -values.shape[1] % group_size
    groups = F.pad(values, (0, missing)).view(len(x), -1, group_size)
    scales = (groups.abs().amax(-1) / LARGEST).clamp(min=_SMALLEST_SCALE)
    quantized = to_fp8(groups / scales.unsqueeze(-1)).flatten(1)
    return quantized[:, : values.shape[1]], scales


def quantize_static(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [T, K] -> float8_e4m3fn [T, K], with one scale."""
    return to_fp8(x.float() / scale)


def to_fp8(values: torch.Tensor) -> torch.Tensor:
    """fp32 -> float8_e4m3fn, where what is too large becomes the largest; torch alone makes it NaN."""
    return values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def _joined_bytes(codes: Sequence[torch.Tensor]) -> torch.Tensor:
    """torch concatenates no fp8 on some devices."""
    return torch.cat([each.view(torch.uint8) for each in codes]).view(torch.float8_e4m3fn)
