"""The definition of a layer of experts, in fp64."""

from __future__ import annotations

import torch


def naive_route(logits: torch.Tensor, top_k: int, *, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E] -> the experts with the largest ones, from the largest on, [T, k], and their weights in
    fp64: the softmax of all logits, divided by its sum over a token's experts if it is renormalised."""
    probabilities = logits.double().softmax(-1)
    weights, experts = probabilities.topk(top_k, dim=-1)
    return experts, weights / weights.sum(-1, keepdim=True) if renormalise else weights


def naive_gated(
    gate: torch.Tensor, up: torch.Tensor, kind: str, alpha: float = 1.0, limit: float = 0.0
) -> torch.Tensor:
    """kind(gate) * up; "clamped" is gpt-oss's: gate * sigmoid(alpha * gate) * (up + 1) of clamped ones."""
    if kind == "clamped":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + 1)
    if kind == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none") * up


def naive_dequantize(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """MXFP4: bytes [..., K / 2], of which each holds two neighbours, the first in its low half, and exponents
    [..., K / 32] plus 127 -> [..., K] in fp64."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    values = torch.cat((magnitudes, -magnitudes)).to(blocks.device)
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    return values[codes.long()] * torch.exp2(scales.double() - 127).repeat_interleave(32, -1)


def naive_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    kind: str = "silu",
    alpha: float = 1.0,
    limit: float = 0.0,
) -> torch.Tensor:
    """The weighted sum of what each token's experts make of it, [T, H] in fp64.

    Args:
        x: [T, H].
        experts, weights: [T, k].
        gate_up: [E, 2 * I, H], the rows of gate before those of up; its bias is [E, 2 * I].
        down: [E, H, I]; its bias is [E, H].
    """
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token, (chosen, shares) in enumerate(zip(experts.tolist(), weights.double(), strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            product = gate_up[expert].double() @ x[token].double()
            if gate_up_bias is not None:
                product = product + gate_up_bias[expert].double()
            gate, up = product.chunk(2)
            made = down[expert].double() @ naive_gated(gate, up, kind, alpha, limit)
            if down_bias is not None:
                made = made + down_bias[expert].double()
            out[token] += share * made
    return out
