"""Rotary position embedding (arXiv:2104.09864), in the half-split layout of Hugging Face checkpoints."""

from __future__ import annotations

import math

import torch
from torch import nn

from engine.model_config import RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> torch.Tensor:
    """Angle per position of each pair of channels, [head_dim / 2] fp32, scaling applied."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    stretched = frequencies / scaling.factor
    if scaling.kind == "linear":
        return stretched
    # llama3: how many times a channel turns in the original context decides how much it is stretched.
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return stretched * (1 - keep) + frequencies * keep


class RotaryEmbedding(nn.Module):
    """Holds the table of cosines and signed sines; one per model, looked up once per step."""

    table: torch.Tensor

    def __init__(self, head_dim: int, max_positions: int, theta: float, scaling: RopeScaling | None) -> None:
        super().__init__()
        dtype = torch.get_default_dtype()
        frequencies = inverse_frequencies(head_dim, theta, scaling)
        angles = torch.arange(max_positions, dtype=torch.float32, device="cpu")[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        table = torch.cat((cos, cos, -sin, sin), dim=-1).to(dtype)
        device = torch.get_default_device()
        self.register_buffer("table", table.to(device), persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [T] -> (cosines, signed sines), each [T, 1, head_dim], for apply_rotary."""
        cos, sin = self.table.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
        return cos, sin


def apply_rotary(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates heads [T, H, D] by the angles of each token's position.

    Channel i pairs with i + D/2: (a, b) -> (a cos - b sin, b cos + a sin). The first half of `sin` is
    negative already, so that this is heads * cos + swapped halves * sin.
    """
    first, second = heads.chunk(2, dim=-1)
    return torch.addcmul(heads * cos, torch.cat((second, first), dim=-1), sin)
