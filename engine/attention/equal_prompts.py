"""cuDNN's attention, where it is the fastest: steps of nothing but whole prompts of one length.

Its causal mask begins at the first key, its variable-length form plans anew for every combination of lengths,
and it does not see the paged pool. For equal prompts without earlier context it needs one plan, and gathering
their keys and values costs less than it saves (docs/benchmarks.md).
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.attention.backend import IntArray, LayerKVCache

logger = logging.getLogger(__name__)

# Below, attention is too small a part of a step.
_SHORTEST = 512
_LARGEST_HEAD = 128
# Planning takes about 50 ms, so that a combination must have come before to be worth it.
_MAX_REMEMBERED = 4096


class EqualPrompts:
    """Says which steps cuDNN computes, and computes them. If it cannot, it is not asked again.

    Args:
        allowed: whether it may be used at all.
    """

    def __init__(self, head_dim: int, dtype: torch.dtype, device: torch.device, *, allowed: bool) -> None:
        self._usable = allowed and device.type == "cuda" and dtype.itemsize == 2 and head_dim <= _LARGEST_HEAD
        self._seen: set[tuple[int, int]] = set()

    def length(self, starts: IntArray, counts: IntArray) -> int:
        """The length of every prompt, if cuDNN is to compute a step of these tokens; else 0."""
        if not self._usable or not len(counts):
            return 0
        length = int(counts[0])
        if length < _SHORTEST or starts.any() or (counts != length).any():
            return 0
        combination = len(counts), length
        if combination in self._seen:
            return length
        if len(self._seen) >= _MAX_REMEMBERED:
            self._seen.clear()
        self._seen.add(combination)
        return 0

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: LayerKVCache,
        slot_mapping: torch.Tensor,
        length: int,
        scale: float,
    ) -> torch.Tensor | None:
        """Causal attention of each prompt to itself; None if cuDNN cannot.

        Args:
            query: [T, H, D].
            slot_mapping: where the prompts' keys and values are, [T].
            length: of each prompt.

        Returns:
            [T, H, D].
        """
        if not self._usable:
            return None
        gathered = (
            cache.view(-1, *cache.shape[2:]).index_select(0, slot_mapping)
            for cache in (kv_cache.key, kv_cache.value)
        )
        states = (query, *gathered)
        q, k, v = (x.reshape(-1, length, *x.shape[1:]).transpose(1, 2) for x in states)  # [B, H, L, D]
        try:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                attended = F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
                )
        except RuntimeError as error:
            self._usable = False
            logger.warning("cuDNN cannot attend, the project's own kernels do instead: %s", error)
            return None
        out: torch.Tensor = attended.transpose(1, 2).flatten(0, 1)
        return out
