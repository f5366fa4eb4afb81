"""An adapter in host memory, as its files have it: no device, no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from engine.lora.config import AdapterConfig


@dataclass(frozen=True, slots=True)
class LoraMatrix:
    """What an adapter adds to a matrix W [out, in]: scale * b @ a.

    Attributes:
        a: [r, in]; of an embedding [r, vocab].
        b: [out, r]; of an embedding [hidden, r].
        scale: alpha / r, or alpha / sqrt(r).
        magnitude: of DoRA: the length that each row of W + scale * b @ a is brought to, [out].
        bias: what is added to the output, scale included, [out].
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of `a`."""
        return self.a.shape[0]

    def delta(self) -> torch.Tensor:
        """scale * b @ a in fp32, [out, in]."""
        return self.scale * (self.b.float() @ self.a.float())

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """The matrix with the adapter in it, in fp32: weight [out, in] is the base's. An adapter's bias is
        not part of it."""
        changed = weight.float() + self.delta()
        if self.magnitude is None:
            return changed
        length: torch.Tensor = torch.linalg.vector_norm(changed, dim=1)
        scaled: torch.Tensor = changed * (self.magnitude.float() / length).unsqueeze(1)
        return scaled

    def output_rows(self, first: int, size: int) -> LoraMatrix:
        """The part for output features [first, first + size)."""
        rows = slice(first, first + size)
        return LoraMatrix(
            self.a,
            self.b[rows],
            self.scale,
            None if self.magnitude is None else self.magnitude[rows],
            None if self.bias is None else self.bias[rows],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """The tensors of an adapter, by the full names of the base model's modules as PEFT has them, such as
    "model.layers.0.self_attn.q_proj".

    Attributes:
        config: its adapter_config.json.
        matrices: of linear layers.
        embeddings: of token embeddings.
        biases: trained biases, which replace the base's, [out].
        saved: whole weights that replace the base's, [out, in].
        num_bytes: of all tensors.
    """

    config: AdapterConfig
    matrices: Mapping[str, LoraMatrix]
    embeddings: Mapping[str, LoraMatrix] = field(default_factory=dict)
    biases: Mapping[str, torch.Tensor] = field(default_factory=dict)
    saved: Mapping[str, torch.Tensor] = field(default_factory=dict)
    num_bytes: int = 0

    @property
    def max_rank(self) -> int:
        """The largest rank of any module; 0 where whole weights are all that there is."""
        return max((each.rank for each in (*self.matrices.values(), *self.embeddings.values())), default=0)
