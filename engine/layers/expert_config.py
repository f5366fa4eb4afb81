"""What differs between the experts of one model and another. Imports no torch, as configurations do not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GatedActivation:
    """kind(gate) * up (arXiv:2002.05202).

    Attributes:
        kind: "silu", "gelu", "gelu_tanh", or gpt-oss's "clamped": gate * sigmoid(alpha * gate) * (up + 1), of
            a gate that is at most `limit`, and of what `up` is between -limit and limit.
        alpha, limit: of "clamped".
    """

    kind: str
    alpha: float = 1.0
    limit: float = 0.0


@dataclass(frozen=True, slots=True)
class ExpertTensors:
    """How checkpoints keep the matrices of a layer's experts.

    Attributes:
        stacked: whether those of all experts are one tensor, [E, N, K], with gate and up in one; else each is
            a tensor of its own, though a stacked one is taken for them.
        interleaved: whether rows of gate and up take turns in a stacked tensor; else all of gate come first.
        transposed: whether plain matrices are stacked as [E, K, N].
    """

    stacked: bool = False
    interleaved: bool = False
    transposed: bool = False
