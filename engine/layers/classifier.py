"""A classification head: one number for each class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from engine.layers.weights import LoadableModule


class ClassificationHead(LoadableModule):
    """States [n, hidden] fp32 -> logits [n, classes] fp32.

    It is small and decides alone, so that it is kept and computed in fp32 whatever the model's number format,
    and whole on every rank.
    """

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        weight = torch.empty(num_classes, hidden_size, dtype=torch.float32)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return F.linear(states, self.weight)
