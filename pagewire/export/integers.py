"""Matrices of small integers with a scale, and a zero point, for each group of inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_SMALLEST_SCALE = 2.0**-20  # a normal number of fp16 is above 2**-14; below it scales lose bits, not range


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """What the weights of each group are rounded to: (q - zero) * scale, 0 <= q < 2 ** bits.

    Attributes:
        scales: fp32 that fp16 holds exactly, [N, G].
        zeros: whole numbers, fp32 [N, G].
        bits: of q.
        group_size: inputs of a group.
    """

    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int
    group_size: int

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest q of each weight, [N, K] -> fp32 [N, K]."""
        groups = in_groups(weight, self.group_size)
        codes = (groups / self.scales[..., None]).round_() + self.zeros[..., None]
        return codes.clamp_(0, 2**self.bits - 1).flatten(1)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes [N, K] stand for, fp32."""
        groups = in_groups(codes, self.group_size)
        return ((groups - self.zeros[..., None]) * self.scales[..., None]).flatten(1)

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest numbers of the grid, fp32 [N, K]."""
        return self.values(self.codes(weight))


@dataclass(frozen=True, slots=True, eq=False)
class IntegerMatrix:
    """A matrix [N, K]: codes, fp32 whole numbers [N, K], on a grid."""

    grid: Grid
    codes: torch.Tensor

    def weight(self) -> torch.Tensor:
        """What it stands for, fp32 [N, K]."""
        return self.grid.values(self.codes)


def in_groups(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """[N, K] -> [N, G, K / G]."""
    return values.reshape(len(values), -1, group_size)


def asymmetric_grid(weight: torch.Tensor, bits: int, group_size: int) -> Grid:
    """The grid that spans each group from its smallest to its largest weight, zero among them."""
    groups = in_groups(weight, group_size)
    low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    scales = _in_fp16((high - low) / (2**bits - 1))
    zeros = (-low / scales).round_().clamp_(0, 2**bits - 1)
    return Grid(scales, zeros, bits, group_size)


def symmetric_grid(weight: torch.Tensor, bits: int, group_size: int) -> Grid:
    """The grid with zero in its middle that reaches each group's largest magnitude, as GPTQ has it."""
    largest = in_groups(weight, group_size).abs().amax(-1)
    scales = _in_fp16(2 * largest / (2**bits - 1))
    return Grid(scales, torch.full_like(scales, 2 ** (bits - 1)), bits, group_size)


def _in_fp16(scales: torch.Tensor) -> torch.Tensor:
    """As files hold them."""
    largest = torch.finfo(torch.float16).max
    return scales.clamp(_SMALLEST_SCALE, largest).half().float()
