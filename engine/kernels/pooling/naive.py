"""The definition of pooling; tests compare the kernel to it."""

from __future__ import annotations

import torch


def naive_pool(
    hidden: torch.Tensor, before: torch.Tensor | None, divisor: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Adds hidden states, [n, size], to what was summed before, [size] fp32.

    Returns:
        (the sum, the sum divided by the divisor, or None if that is 0), [size] fp32.
    """
    total = hidden.double().sum(0)
    if before is not None:
        total = total + before.double()
    return total.float(), (total / divisor).float() if divisor else None
