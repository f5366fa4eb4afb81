"""The attention layer: where a model meets the paged KV cache and an attention backend."""

from __future__ import annotations

import torch
from torch import nn

from engine.attention.interface import (
    AttentionBackend,
    AttentionSpec,
    HeadLayout,
    LayerKVCache,
    QKNorm,
)
from engine.layers.step_context import StepContext


class Attention(nn.Module):
    """Rotation and scaled dot-product attention of one layer over the paged cache, by the given backend.

    Args:
        rotary: which of the model's `rotary_tables` turns its queries and keys; None for no rotation.
        kv_group: which of the step's block tables finds its context; set anew when the groups of the whole
            model are known (engine/platform/assemble.py).

    Attributes:
        kv_scales: what the numbers of a cache of 8 bits are multiplied with, keys' and values'; the
            checkpoint's, where it has some (engine/loader/kv_scales.py).
    """

    def __init__(
        self,
        heads: HeadLayout,
        spec: AttentionSpec,
        *,
        rotary: int | None,
        kv_group: int,
        backend: AttentionBackend,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.spec = spec
        self.rotary = rotary
        self.kv_group = kv_group
        self.backend = backend
        self.kv_scales = (1.0, 1.0)

    def forward(
        self,
        qkv: torch.Tensor,
        norm: QKNorm | None,
        kv_cache: LayerKVCache,
        context: StepContext,
    ) -> torch.Tensor:
        """Rotates queries and keys, stores the new keys and values, then attends.

        Args:
            qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim], queries, then keys, then values. May be
                overwritten.

        Returns:
            [T, num_heads * head_dim].
        """
        metadata = context.attention[self.kv_group]
        rotation = None if self.rotary is None else context.rotations[self.rotary]
        query = self.backend.rotate_and_store(qkv, self.heads, norm, rotation, kv_cache, metadata)
        return self.backend.forward(query, kv_cache, metadata, self.spec).flatten(1)
