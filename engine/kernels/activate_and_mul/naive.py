"""The definition of a gated activation."""

from __future__ import annotations

import math

import torch


def naive_activate_and_mul(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """[T, 2 * n], gate then up -> activation(gate) * up, [T, n], in fp32 and rounded once (arXiv:2002.05202).

    Args:
        activation: "silu" (arXiv:1702.03118), "gelu" (arXiv:1606.08415) or "gelu_tanh", its approximation.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    if activation == "silu":
        activated = gate / (1 + torch.exp(-gate))
    elif activation == "gelu":
        activated = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    else:
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        activated = 0.5 * gate * (1 + torch.tanh(inner))
    return (activated * up).to(gate_up.dtype)
