"""int8 weights times int8 inputs, the arithmetic of SmoothQuant (arXiv:2211.10438)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

import torch

from engine.quant.layouts.base import Layout, join, same

_LARGEST = 127
_SMALLEST_SCALE = 1e-10


@dataclasses.dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Int8Channels(Layout):
    """y[t, n] = sx[t] * scales[n] * (sum over k of qx[t, k] * codes[n, k] - input_zero * sums[n]), where the
    sum is of integers, exact, and x is near sx * (qx - input_zero).

    Attributes:
        codes: int8 [N, K].
        scales: fp32 [N].
        input_scale: fp32 [1], the sx of all tokens; None where each token has its own, its largest magnitude
            over 127 (`quantize_tokens`).
        input_zero: int32 [1], where x's zero is not 0; needs an input_scale.
        sums: int32 [N], the sum of each output's codes; where there is an input_zero.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    input_scale: torch.Tensor | None
    input_zero: torch.Tensor | None
    sums: torch.Tensor | None

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    def rows(self, begin: int, end: int) -> torch.Tensor:
        return self.codes[begin:end].float() * self.scales[begin:end, None]

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.input_scale is None:
            quantized, input_scales = quantize_tokens(x)
        else:
            quantized, input_scales = quantize_static(x, self.input_scale, self.input_zero), self.input_scale
        # Sums of products of bytes are exact in 64-bit floats, and CPUs multiply no integers fast.
        left = quantized.double()
        parts = [left @ self.codes[begin:end].double().T for begin, end in self.tiles()]
        sums = torch.cat(parts, dim=-1)
        if self.input_zero is not None:
            assert self.sums is not None
            sums = sums - self.input_zero * self.sums
        product = sums.float() * input_scales * self.scales
        return (product if bias is None else product + bias).to(x.dtype)

    def fits(self, other: Self) -> bool:
        return same(self.input_scale, other.input_scale) and same(self.input_zero, other.input_zero)

    @classmethod
    def joined(cls, layouts: Sequence[Self]) -> Self:
        return dataclasses.replace(
            layouts[0],
            codes=torch.cat([layout.codes for layout in layouts]),
            scales=torch.cat([layout.scales for layout in layouts]),
            sums=join([layout.sums for layout in layouts], 0),
        )


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] -> int8 [T, K] and the scale of each token, fp32 [T, 1]."""
    values = x.float()
    scales = (values.abs().amax(-1, keepdim=True) / _LARGEST).clamp(min=_SMALLEST_SCALE)
    return (values / scales).round().to(torch.int8), scales


def quantize_static(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """x [T, K] -> int8 [T, K], with one scale, and a zero point or none."""
    values = (x.float() / scale).round()
    return (values if zero is None else values + zero).clamp(-128, _LARGEST).to(torch.int8)
