"""Paged attention with torch operators only: for CPUs, and for any device without a kernel of its own.

Requests that compute one token are batched: their contexts are gathered side by side, padded to the longest
of a bucket, and attended by one call. Longer chunks attend one request at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from engine.attention.interface import (
    AttentionBackend,
    AttentionMetadata,
    BatchLayout,
    HeadLayout,
    IntArray,
    LayerKVCache,
    QKNorm,
    Rotation,
)
from engine.cpu.ops import TorchLayerOps

# A bucket takes shorter requests until padding would exceed this share of its real blocks...
MAX_PADDING_SHARE = 0.25
# ... or this many blocks, below which one more call costs more than the padding.
MIN_PADDING_BLOCKS = 32


# Which blocks to gather, in order: ids, or a range where they lie side by side and need no copy.
BlockIds = torch.Tensor | slice


@dataclass(slots=True)
class DecodeBucket:
    """Requests at query rows begin to end that compute one token each.

    Attributes:
        block_ids: of the padded contexts, flat, B * blocks of them.
        length: what the gathered contexts are cut to.
        mask: added to the scores, 0 inside each context and -inf in its padding, [B, 1, 1, length]; None
            where all contexts are of this length.
        stale: index into the gathered slots (a copy then) of those in a request's last block that its
            context has not reached; None where all contexts are of this length.
    """

    begin: int
    end: int
    block_ids: BlockIds
    length: int
    mask: torch.Tensor | None
    stale: torch.Tensor | None


@dataclass(slots=True)
class PrefillChunk:
    """One request's tokens at query rows begin to end, the last of a context of `length`.

    Attributes:
        mask: added to the scores, [end - begin, length]; None where the chunk is the whole context, which
            is plain causal attention.
    """

    begin: int
    end: int
    block_ids: BlockIds
    length: int
    mask: torch.Tensor | None


@dataclass(slots=True)
class TorchAttentionMetadata(AttentionMetadata):
    """The step cut into calls."""

    decodes: list[DecodeBucket]
    chunks: list[PrefillChunk]


@dataclass(slots=True)
class TorchRotation(Rotation):
    """Cosines and sines of each token, over the whole head: the first half of `sin` is negative, so that a
    rotated head is head * cos + (its halves swapped) * sin. Each [T, 1, head_dim]."""

    cos: torch.Tensor
    sin: torch.Tensor


class TorchAttentionBackend(AttentionBackend):
    """See the module. `device` and `dtype` are those of the model."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._norm = TorchLayerOps(device).rms_norm

    def rotation(self, table: torch.Tensor, positions: torch.Tensor) -> TorchRotation:
        cos, sin = table.index_select(0, positions).to(self.dtype).unsqueeze(1).chunk(2, dim=-1)
        return TorchRotation(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        heads: HeadLayout,
        norm: QKNorm | None,
        rotation: Rotation,
        kv_cache: LayerKVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        assert isinstance(rotation, TorchRotation)
        every = qkv.view(len(qkv), -1, heads.head_dim)
        num_rotated = heads.num_heads + heads.num_kv_heads
        turned, value = every[:, :num_rotated], every[:, num_rotated:]
        if norm is not None:
            query, key = turned[:, : heads.num_heads], turned[:, heads.num_heads :]
            normalised = (self._norm(query, norm.query, norm.eps), self._norm(key, norm.key, norm.eps))
            turned = torch.cat(normalised, dim=1)
        rotated = rotate(turned, rotation)
        kv_cache.store(rotated[:, heads.num_heads :], value, metadata.slot_mapping)
        return rotated[:, : heads.num_heads]

    def prepare(self, layout: BatchLayout) -> TorchAttentionMetadata:
        """Everything about a step that is the same for every layer, computed once."""
        starts = np.concatenate(([0], np.cumsum(layout.counts)))
        decodes = [self._bucket(layout, begin, end) for begin, end in _decode_buckets(layout)]
        chunks = [
            self._chunk(layout, request, int(starts[request]), int(starts[request + 1]))
            for request in range(layout.num_decodes, len(layout.counts))
        ]
        return TorchAttentionMetadata(
            slot_mapping=self._tensor(layout.slot_mapping),
            decodes=decodes,
            chunks=chunks,
        )

    def forward(
        self,
        query: torch.Tensor,
        kv_cache: LayerKVCache,
        metadata: AttentionMetadata,
        scale: float,
    ) -> torch.Tensor:
        assert isinstance(metadata, TorchAttentionMetadata)
        parts = [_attend_decodes(query, kv_cache, bucket, scale) for bucket in metadata.decodes]
        parts += [_attend_chunk(query, kv_cache, chunk, scale) for chunk in metadata.chunks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _bucket(self, layout: BatchLayout, begin: int, end: int) -> DecodeBucket:
        lengths = layout.seq_lens[begin:end]
        longest = int(lengths[0])
        num_blocks = -(-longest // layout.block_size)
        table = layout.block_table[begin:end, :num_blocks]
        own_blocks = -(-lengths // layout.block_size)
        # Past its own blocks a request repeats its first one: real keys and values, so surely finite.
        table = np.where(np.arange(num_blocks) < own_blocks[:, None], table, table[:, :1])
        mask = stale = None
        if int(lengths[-1]) != longest:
            slots = np.arange(num_blocks * layout.block_size)
            outside = slots >= lengths[:, None]
            stale = self._tensor(np.flatnonzero(outside & (slots < own_blocks[:, None] * layout.block_size)))
            mask = torch.zeros((end - begin, longest), device=self.device, dtype=self.dtype)
            mask = mask.masked_fill_(self._tensor(outside[:, :longest]), -torch.inf)[:, None, None]
        # Stale slots are cleared in a copy, never in the pool.
        flat = table.reshape(-1)
        block_ids = self._block_ids(flat) if stale is None else self._tensor(flat)
        return DecodeBucket(begin, end, block_ids, longest, mask, stale)

    def _chunk(self, layout: BatchLayout, request: int, begin: int, end: int) -> PrefillChunk:
        length = int(layout.seq_lens[request])
        num_blocks = -(-length // layout.block_size)
        block_ids = self._block_ids(layout.block_table[request, :num_blocks])
        mask = None
        count = end - begin
        if count != length:
            mask = torch.full((count, length), -torch.inf, device=self.device, dtype=self.dtype)
            mask = mask.triu_(length - count + 1)
        return PrefillChunk(begin, end, block_ids, length, mask)

    def _block_ids(self, ids: IntArray) -> BlockIds:
        if (np.diff(ids) == 1).all():
            return slice(int(ids[0]), int(ids[-1]) + 1)
        return self._tensor(ids)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


def rotate(heads: torch.Tensor, rotation: TorchRotation) -> torch.Tensor:
    """Rotates heads [T, H, D] by the angles of each token's position."""
    first, second = heads.chunk(2, dim=-1)
    return torch.addcmul(heads * rotation.cos, torch.cat((second, first), dim=-1), rotation.sin)


def _decode_buckets(layout: BatchLayout) -> list[tuple[int, int]]:
    """Cuts the one-token requests, longest first, into ranges whose padding is bounded."""
    blocks: IntArray = -(-layout.seq_lens[: layout.num_decodes] // layout.block_size)
    buckets, begin, padding, real = [], 0, 0, 0
    for request, own in enumerate(blocks.tolist()):
        grown = padding + int(blocks[begin]) - own
        if grown > max(MIN_PADDING_BLOCKS, MAX_PADDING_SHARE * (real + own)):
            buckets.append((begin, request))
            begin, grown, real = request, 0, 0
        padding, real = grown, real + own
    if len(blocks):
        buckets.append((begin, len(blocks)))
    return buckets


def _gather(
    cache: torch.Tensor, block_ids: BlockIds, batch: int, length: int, stale: torch.Tensor | None = None
) -> torch.Tensor:
    """The contexts in the given blocks, [batch, length, HK, D], with the stale slots set to zero.

    A masked slot has a weight of zero, but zero times a NaN left in unused memory would still be NaN.
    """
    blocks = cache[block_ids] if isinstance(block_ids, slice) else cache.index_select(0, block_ids)
    if stale is not None:
        blocks.flatten(0, 1).index_fill_(0, stale, 0)
    return blocks.view(batch, -1, *cache.shape[2:])[:, :length]


def _attend_decodes(
    query: torch.Tensor, kv_cache: LayerKVCache, bucket: DecodeBucket, scale: float
) -> torch.Tensor:
    batch = bucket.end - bucket.begin
    keys = _gather(kv_cache.key, bucket.block_ids, batch, bucket.length, bucket.stale)
    values = _gather(kv_cache.value, bucket.block_ids, batch, bucket.length, bucket.stale)
    # Query heads that share a key-value head become the rows of one small matrix: [B, HK, G, D].
    grouped = query[bucket.begin : bucket.end].reshape(batch, kv_cache.key.shape[2], -1, query.shape[2])
    output = F.scaled_dot_product_attention(
        grouped, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=bucket.mask, scale=scale
    )
    return output.flatten(1, 2)


def _attend_chunk(
    query: torch.Tensor, kv_cache: LayerKVCache, chunk: PrefillChunk, scale: float
) -> torch.Tensor:
    keys = _gather(kv_cache.key, chunk.block_ids, 1, chunk.length)[0].transpose(0, 1)
    values = _gather(kv_cache.value, chunk.block_ids, 1, chunk.length)[0].transpose(0, 1)
    # Key-value heads are the batch, and their query heads see them without a copy: [HK, G, n, D].
    rows = query[chunk.begin : chunk.end]
    grouped = rows.reshape(len(rows), keys.shape[0], -1, rows.shape[2]).permute(1, 2, 0, 3)
    group = grouped.shape[1]
    output = F.scaled_dot_product_attention(
        grouped,
        keys.unsqueeze(1).expand(-1, group, -1, -1),
        values.unsqueeze(1).expand(-1, group, -1, -1),
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None,
        scale=scale,
    )
    return output.permute(2, 0, 1, 3).flatten(1, 2)
