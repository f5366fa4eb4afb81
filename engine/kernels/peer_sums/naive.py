"""What the ranks of a group get of each other, as a reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def naive_sum(partials: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of every rank's partial result, added in rank order in fp32, in the partials' dtype."""
    total = torch.zeros(partials[0].shape, dtype=torch.float32, device=partials[0].device)
    for partial in partials:
        total += partial.float()
    return total.to(partials[0].dtype)


def naive_gather(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Every rank's numbers, [size, n], in rank order; -0.0 becomes 0.0."""
    return torch.stack([torch.where(part == 0, torch.zeros_like(part), part).flatten() for part in parts])
