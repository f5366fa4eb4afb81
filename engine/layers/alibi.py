"""Attention with linear biases (arXiv:2108.12409)."""

from __future__ import annotations

import torch


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """What each head takes from a score for each token between key and query, [num_heads] fp32.

    n heads, a power of two, have 2^(-8/n), 2^(-16/n), ... Other numbers of heads take those of the power of
    two below and then every second one of the power above, as the paper's authors do.
    """
    whole = 1 << (num_heads.bit_length() - 1)
    exponents = [8 * i / whole for i in range(1, whole + 1)]
    exponents += [4 * i / whole for i in range(1, 2 * (num_heads - whole), 2)]
    return torch.tensor([2.0**-exponent for exponent in exponents], dtype=torch.float32)
