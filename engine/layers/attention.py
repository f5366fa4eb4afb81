"""The attention layer: where a model meets the paged KV cache and an attention backend."""

from __future__ import annotations

import torch
from torch import nn

from engine.attention.interface import (
    AttentionBackend,
    AttentionMetadata,
    HeadLayout,
    LayerKVCache,
    QKNorm,
    Rotation,
)


class Attention(nn.Module):
    """Rotation and scaled dot-product attention of one layer over the paged cache, by the given backend."""

    def __init__(self, heads: HeadLayout, *, scale: float, backend: AttentionBackend) -> None:
        super().__init__()
        self.heads = heads
        self.scale = scale
        self.backend = backend

    def forward(
        self,
        qkv: torch.Tensor,
        norm: QKNorm | None,
        rotation: Rotation,
        kv_cache: LayerKVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Rotates queries and keys, stores the new keys and values, then attends.

        Args:
            qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim], queries, then keys, then values. May be
                overwritten.

        Returns:
            [T, num_heads * head_dim].
        """
        query = self.backend.rotate_and_store(qkv, self.heads, norm, rotation, kv_cache, metadata)
        return self.backend.forward(query, kv_cache, metadata, self.scale).flatten(1)
