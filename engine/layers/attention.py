"""The attention layer: where a model meets the paged KV cache and an attention backend."""

from __future__ import annotations

import torch
from torch import nn

from engine.attention.backend import AttentionBackend, AttentionMetadata, LayerKVCache


class Attention(nn.Module):
    """Scaled dot-product attention of one layer over the paged cache, by whichever backend it was given."""

    def __init__(self, *, scale: float, backend: AttentionBackend) -> None:
        super().__init__()
        self.scale = scale
        self.backend = backend

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: LayerKVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Stores the new keys and values, then attends.

        Args:
            query: [T, num_heads, head_dim].
            key, value: [T, num_kv_heads, head_dim], of the same tokens.

        Returns:
            [T, num_heads * head_dim].
        """
        kv_cache.store(key, value, metadata.slot_mapping)
        return self.backend.forward(query, kv_cache, metadata, self.scale).flatten(1)
