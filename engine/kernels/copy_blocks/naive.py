"""The definition of a copy of KV blocks."""

from __future__ import annotations

import torch


def naive_copy_blocks(pool: torch.Tensor, sources: torch.Tensor, destinations: torch.Tensor) -> None:
    """pool[:, :, destinations[k]] = pool[:, :, sources[k]] for pool [L, 2, N, ...], one after another; a
    source of -1 is skipped."""
    for source, destination in zip(sources.tolist(), destinations.tolist(), strict=True):
        if source >= 0:
            pool[:, :, destination] = pool[:, :, source].clone()
