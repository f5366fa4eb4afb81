"""The angles of rotary position embedding (arXiv:2104.09864)."""

from __future__ import annotations

import math

import torch

from engine.layers.rope_scaling import RopeScaling


def inverse_frequencies(
    rotary_dim: int, theta: float, scaling: RopeScaling | None, max_positions: int
) -> torch.Tensor:
    """Angle per position of each pair of channels, [rotary_dim / 2] fp32, scaling applied."""
    if scaling is not None and scaling.kind in ("dynamic", "qwen_dynamic"):
        theta *= _stretch_of_base(scaling, max_positions) ** (rotary_dim / (rotary_dim - 2))
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None or scaling.kind in ("dynamic", "qwen_dynamic"):
        return frequencies
    if scaling.kind == "longrope":
        is_long = max_positions > scaling.original_max_position
        divisors = scaling.long_factors if is_long else scaling.short_factors
        return 1.0 / (torch.tensor(divisors, dtype=torch.float32, device="cpu") * theta**exponents)
    stretched = frequencies / scaling.factor
    if scaling.kind == "linear":
        return stretched
    if scaling.kind == "yarn":
        keep = _kept_by_yarn(rotary_dim, theta, scaling)
    else:
        keep = _kept_by_llama3(frequencies, scaling)
    return stretched * (1 - keep) + frequencies * keep


def _stretch_of_base(scaling: RopeScaling, max_positions: int) -> float:
    """What "dynamic" scaling raises the base by, before the exponent."""
    length, original = max(max_positions, scaling.original_max_position), scaling.original_max_position
    if scaling.kind == "qwen_dynamic":
        return max(2.0 ** math.ceil(math.log2(length / original) + 1) - 1, 1.0)
    return scaling.factor * length / original - (scaling.factor - 1)


def _kept_by_llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """How many times a channel turns in the original context decides how much of it is kept."""
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0.0, 1.0)


def _kept_by_yarn(rotary_dim: int, theta: float, scaling: RopeScaling) -> torch.Tensor:
    """A linear ramp over channels, between the one that turns beta_fast times in the original context and the
    one that turns beta_slow times."""

    def channel(turns: float) -> float:
        wavelength = scaling.original_max_position / (turns * 2 * math.pi)
        return rotary_dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    channels = torch.arange(rotary_dim // 2, dtype=torch.float32, device="cpu")
    return 1 - ((channels - low) / (high - low)).clamp(0.0, 1.0)


def rotary_table(
    rotary_dim: int, max_positions: int, theta: float, scaling: RopeScaling | None
) -> torch.Tensor:
    """Cosines, then sines, of every position's angles, [max_positions, rotary_dim] fp32, on the default
    device."""
    device = torch.get_default_device()
    if device.type == "meta":  # torch would import its compiler to find out this much
        return torch.empty(max_positions, rotary_dim, dtype=torch.float32)
    frequencies = inverse_frequencies(rotary_dim, theta, scaling, max_positions).to(device)
    angles = torch.arange(max_positions, dtype=torch.float32, device=device)[:, None] * frequencies
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return table if scaling is None else table.mul_(scaling.attention_factor)


def log_query_scale(max_positions: int, start: int) -> torch.Tensor:
    """What the query at each position is multiplied with, [max_positions] fp32, on the default device: the
    logarithm of its 1-based position to the base `start`, from there on, and 1 before (Qwen's logn
    attention)."""
    device = torch.get_default_device()
    if device.type == "meta":
        return torch.empty(max_positions, dtype=torch.float32)
    counts = torch.arange(1, max_positions + 1, dtype=torch.float32, device=device)
    return (counts.log() / math.log(start)).clamp(min=1.0)
