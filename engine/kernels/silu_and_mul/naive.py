"""The definition of SwiGLU's activation."""

from __future__ import annotations

import torch


def naive_silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 * n], gate then up -> silu(gate) * up, [T, n], in fp32 and rounded once (arXiv:2002.05202)."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)
