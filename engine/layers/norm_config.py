"""How activations are normalised. No torch: configurations are read before it is imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class NormConfig:
    """How a model normalises activations.

    Attributes:
        kind: "rms" (arXiv:1910.07467) or "layer" (arXiv:1607.06450).
        eps: added to the mean square, or to the variance.
        bias: whether a "layer" norm has a bias.
        one_plus: whether checkpoints hold the weights less one, as Gemma's do.
    """

    kind: str = "rms"
    eps: float
    bias: bool = False
    one_plus: bool = False
