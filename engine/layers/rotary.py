"""The angles of rotary position embedding (arXiv:2104.09864)."""

from __future__ import annotations

import math

import torch

from engine.layers.rope_scaling import RopeScaling


def inverse_frequencies(rotary_dim: int, theta: float, scaling: RopeScaling | None) -> torch.Tensor:
    """Angle per position of each pair of channels, [rotary_dim / 2] fp32, scaling applied."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim
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


def rotary_table(
    rotary_dim: int, max_positions: int, theta: float, scaling: RopeScaling | None
) -> torch.Tensor:
    """Cosines, then sines, of every position's angles, [max_positions, rotary_dim] fp32, on the default
    device."""
    device = torch.get_default_device()
    if device.type == "meta":  # torch would import its compiler to find out this much
        return torch.empty(max_positions, rotary_dim, dtype=torch.float32)
    frequencies = inverse_frequencies(rotary_dim, theta, scaling).to(device)
    angles = torch.arange(max_positions, dtype=torch.float32, device=device)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
