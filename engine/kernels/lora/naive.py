"""The definition of what adapters add, in fp64."""

from __future__ import annotations

import torch


def naive_adapters(
    x: torch.Tensor,
    out: torch.Tensor,
    slots: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    sizes: tuple[int, ...],
    *,
    gain: torch.Tensor,
    offset: torch.Tensor,
) -> torch.Tensor:
    """x [T, K], out [T, N], slots [T] (-1 for none), a [S, P, R, K], b [S, N, R], gain and offset [S, N]
    -> [T, N] in fp64: out * gain + offset + b a x of each token's slot, where part p of the rows of b,
    `sizes[p]` of them, belongs to part p of a."""
    result = out.double()
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        first = 0
        value = result[token] * gain[slot].double() + offset[slot].double()
        for part, size in enumerate(sizes):
            shrunk = a[slot, part].double() @ x[token].double()
            value[first : first + size] += b[slot, first : first + size].double() @ shrunk
            first += size
        result[token] = value
    return result
