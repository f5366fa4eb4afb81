"""What every layer of a model may need to know of the step it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.attention.interface import AttentionMetadata, Rotation
from engine.layers.adapters import AdapterBatch


@dataclass(frozen=True, slots=True)
class StepContext:
    """One step, as its layers see it. The runner makes it once and no layer changes it. T tokens.

    Attributes:
        positions: each token's place in its request, [T].
        attention: the step's layout for each KV group, the layers whose block tables are one. A model whose
            layers all reach equally far has one group.
        rotations: the tokens' angles for each of the model's `rotary_tables`, in their order.
        adapters: each token's adapter; None where no request of the step has one, so that nothing is launched
            for them.
    """

    positions: torch.Tensor
    attention: Sequence[AttentionMetadata]
    rotations: Sequence[Rotation]
    adapters: AdapterBatch | None = None
