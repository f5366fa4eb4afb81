"""Paged attention with torch operators only: for CPUs, and for any device without a kernel of its own.

Requests that compute one token are batched: their contexts are gathered side by side, padded to the longest
of a bucket, and attended by one call. Longer chunks attend one request at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from engine.attention.interface import (
    AttentionBackend,
    AttentionMetadata,
    AttentionSpec,
    BatchLayout,
    HeadLayout,
    IntArray,
    LayerKVCache,
    QKNorm,
    RotaryTable,
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
        positions: of the requests' tokens, [B].
        first: position of the first slot that is gathered of each context.
        block_ids: of the padded contexts, flat, B * blocks of them.
        length: what the gathered contexts are cut to.
        mask: added to the scores, 0 where the token sees the slot and else -inf, [B, 1, 1, length]; None
            where every token sees all that is gathered.
        stale: index into the gathered slots (a copy then) of those whose content may be anything: in a
            request's last block where its context has not reached, and behind its window; None where all
            contexts are of this length.
    """

    begin: int
    end: int
    positions: torch.Tensor
    first: int
    block_ids: BlockIds
    length: int
    mask: torch.Tensor | None
    stale: torch.Tensor | None


@dataclass(slots=True)
class PrefillChunk:
    """One request's tokens at query rows begin to end, the last of the `length` that are gathered.

    Attributes:
        mask: added to the scores, [end - begin, length]; None where the chunk is all that is gathered and
            sees it by plain causal attention.
    """

    begin: int
    end: int
    block_ids: BlockIds
    length: int
    mask: torch.Tensor | None


@dataclass(slots=True)
class AttentionCalls:
    """The step cut into calls."""

    decodes: list[DecodeBucket]
    chunks: list[PrefillChunk]


@dataclass(slots=True)
class TorchAttentionMetadata(AttentionMetadata):
    """The step's calls for each sliding window of the model's layers, made for the first that needs them."""

    layout: BatchLayout
    by_window: dict[int, AttentionCalls] = field(default_factory=dict)


@dataclass(slots=True)
class TorchRotation(Rotation):
    """Cosines and sines of each token's R rotated channels, each [T, 1, R].

    The sine of a pair's first channel is negative, so that rotated channels are channels * cos + (the others
    of their pairs) * sin. Queries are multiplied with `query_scale` [T, 1, 1], where there is one.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool
    query_scale: torch.Tensor | None


class TorchAttentionBackend(AttentionBackend):
    """See the module. `device` and `dtype` are those of the model."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._norm = TorchLayerOps(device).rms_norm

    def rotation(self, table: RotaryTable, positions: torch.Tensor) -> TorchRotation:
        cos, sin = table.angles.index_select(0, positions).to(self.dtype).unsqueeze(1).chunk(2, dim=-1)
        if table.interleaved:
            both = torch.stack((cos, cos), dim=-1).flatten(-2), torch.stack((-sin, sin), dim=-1).flatten(-2)
        else:
            both = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        scale = table.query_scale
        if scale is not None:
            scale = scale.index_select(0, positions).to(self.dtype).view(-1, 1, 1)
        return TorchRotation(*both, table.interleaved, scale)

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        heads: HeadLayout,
        norm: QKNorm | None,
        rotation: Rotation | None,
        kv_cache: LayerKVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        every = qkv.view(len(qkv), -1, heads.head_dim)
        num_rotated = heads.num_heads + heads.num_kv_heads
        turned, value = every[:, :num_rotated], every[:, num_rotated:]
        if norm is not None:
            query, key = turned[:, : heads.num_heads], turned[:, heads.num_heads :]
            normalised = (self._norm(query, norm.query, norm.eps), self._norm(key, norm.key, norm.eps))
            turned = torch.cat(normalised, dim=1)
        if rotation is not None:
            assert isinstance(rotation, TorchRotation)
            turned = rotate(turned, rotation)
            if rotation.query_scale is not None:
                turned[:, : heads.num_heads] *= rotation.query_scale
        kv_cache.store(turned[:, heads.num_heads :], value, metadata.slot_mapping)
        return turned[:, : heads.num_heads]

    def prepare(self, layout: BatchLayout) -> TorchAttentionMetadata:
        """What is the same for every layer of a step."""
        return TorchAttentionMetadata(self._tensor(layout.slot_mapping), layout)

    def calls(self, metadata: TorchAttentionMetadata, sliding_window: int) -> AttentionCalls:
        """What is the same for every layer of a step with this window; computed once."""
        if sliding_window not in metadata.by_window:
            metadata.by_window[sliding_window] = self._cut(metadata.layout, sliding_window)
        return metadata.by_window[sliding_window]

    def _cut(self, layout: BatchLayout, window: int) -> AttentionCalls:
        starts = np.concatenate(([0], np.cumsum(layout.counts)))
        decodes = [self._bucket(layout, begin, end, window) for begin, end in _decode_buckets(layout)]
        chunks = [
            self._chunk(layout, request, int(starts[request]), int(starts[request + 1]), window)
            for request in range(layout.num_decodes, len(layout.counts))
        ]
        return AttentionCalls(decodes, chunks)

    def forward(
        self,
        query: torch.Tensor,
        kv_cache: LayerKVCache,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        assert isinstance(metadata, TorchAttentionMetadata)
        calls = self.calls(metadata, spec.sliding_window)
        parts = [_attend_decodes(query, kv_cache, bucket, spec) for bucket in calls.decodes]
        parts += [_attend_chunk(query, kv_cache, chunk, spec) for chunk in calls.chunks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _bucket(self, layout: BatchLayout, begin: int, end: int, window: int) -> DecodeBucket:
        lengths = layout.seq_lens[begin:end]
        longest, shortest = int(lengths[0]), int(lengths[-1])
        # No token sees a block before this one.
        first_block = max(0, shortest - window) // layout.block_size if window else 0
        first = first_block * layout.block_size
        num_blocks = -(-longest // layout.block_size) - first_block
        table = layout.block_table[begin:end, first_block : first_block + num_blocks]
        own_blocks = -(-lengths // layout.block_size) - first_block
        # Past its own blocks a request repeats its first one: real keys and values, so surely finite.
        table = np.where(np.arange(num_blocks) < own_blocks[:, None], table, table[:, :1])
        length = longest - first
        mask = stale = None
        if shortest != longest or (window and first != longest - window):
            slots = first + np.arange(num_blocks * layout.block_size)
            unseen = slots >= lengths[:, None]
            dirty = unseen & (slots < first + own_blocks[:, None] * layout.block_size)
            if window:
                dirty = unseen = unseen | (slots < lengths[:, None] - window)
            if shortest != longest:
                stale = self._tensor(np.flatnonzero(dirty))
            mask = torch.zeros((end - begin, length), device=self.device, dtype=self.dtype)
            mask = mask.masked_fill_(self._tensor(unseen[:, :length]), -torch.inf)[:, None, None]
        # Stale slots are cleared in a copy, never in the pool.
        flat = table.reshape(-1)
        block_ids = self._block_ids(flat) if stale is None else self._tensor(flat)
        return DecodeBucket(begin, end, self._tensor(lengths - 1), first, block_ids, length, mask, stale)

    def _chunk(self, layout: BatchLayout, request: int, begin: int, end: int, window: int) -> PrefillChunk:
        seq_len, count = int(layout.seq_lens[request]), end - begin
        first_block = max(0, seq_len - count + 1 - window) // layout.block_size if window else 0
        num_blocks = -(-seq_len // layout.block_size)
        block_ids = self._block_ids(layout.block_table[request, first_block:num_blocks])
        length = seq_len - first_block * layout.block_size
        mask = None
        if count != length or 0 < window < length:
            mask = torch.full((count, length), -torch.inf, device=self.device, dtype=self.dtype)
            mask = mask.triu_(length - count + 1)
            if window:
                age = torch.arange(length - count, length, device=self.device)[:, None] - torch.arange(
                    length, device=self.device
                )
                mask = mask.masked_fill_(age >= window, -torch.inf)
        return PrefillChunk(begin, end, block_ids, length, mask)

    def _block_ids(self, ids: IntArray) -> BlockIds:
        if (np.diff(ids) == 1).all():
            return slice(int(ids[0]), int(ids[-1]) + 1)
        return self._tensor(ids)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


def rotate(heads: torch.Tensor, rotation: TorchRotation) -> torch.Tensor:
    """Rotates heads [T, H, D] by the angles of each token's position."""
    rotary_dim = rotation.cos.shape[-1]
    if rotary_dim < heads.shape[-1]:
        return torch.cat((rotate(heads[..., :rotary_dim], rotation), heads[..., rotary_dim:]), dim=-1)
    if rotation.interleaved:
        others = heads.reshape(*heads.shape[:-1], -1, 2).flip(-1).flatten(-2)
    else:
        first, second = heads.chunk(2, dim=-1)
        others = torch.cat((second, first), dim=-1)
    return torch.addcmul(heads * rotation.cos, others, rotation.sin)


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
    query: torch.Tensor, kv_cache: LayerKVCache, bucket: DecodeBucket, spec: AttentionSpec
) -> torch.Tensor:
    batch = bucket.end - bucket.begin
    keys = _gather(kv_cache.key, bucket.block_ids, batch, bucket.length, bucket.stale).transpose(1, 2)
    values = _gather(kv_cache.value, bucket.block_ids, batch, bucket.length, bucket.stale).transpose(1, 2)
    # Query heads that share a key-value head become the rows of one small matrix: [B, HK, G, D].
    grouped = query[bucket.begin : bucket.end].reshape(batch, kv_cache.key.shape[2], -1, query.shape[2])
    if not _is_plain(spec):
        slots = torch.arange(bucket.first, bucket.first + bucket.length, device=query.device)
        distances = (bucket.positions[:, None] - slots)[:, None, None]
        return _attend_explicitly(
            grouped, keys, values, bucket.mask, distances, spec, head_shape=grouped.shape[1:3]
        ).flatten(1, 2)
    output = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=bucket.mask, scale=spec.scale)
    return output.flatten(1, 2)


def _attend_chunk(
    query: torch.Tensor, kv_cache: LayerKVCache, chunk: PrefillChunk, spec: AttentionSpec
) -> torch.Tensor:
    keys = _gather(kv_cache.key, chunk.block_ids, 1, chunk.length)[0].transpose(0, 1)
    values = _gather(kv_cache.value, chunk.block_ids, 1, chunk.length)[0].transpose(0, 1)
    # Key-value heads are the batch, and their query heads see them without a copy: [HK, G, n, D].
    rows = query[chunk.begin : chunk.end]
    grouped = rows.reshape(len(rows), keys.shape[0], -1, rows.shape[2]).permute(1, 2, 0, 3)
    group = grouped.shape[1]
    keys = keys.unsqueeze(1).expand(-1, group, -1, -1)
    values = values.unsqueeze(1).expand(-1, group, -1, -1)
    if _is_plain(spec):
        output = F.scaled_dot_product_attention(
            grouped,
            keys,
            values,
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            scale=spec.scale,
        )
    else:
        slots = torch.arange(chunk.length, device=query.device)
        distances = slots[chunk.length - len(rows) :, None] - slots
        mask = chunk.mask
        if mask is None:
            mask = torch.zeros(distances.shape, device=query.device).masked_fill_(distances < 0, -torch.inf)
        output = _attend_explicitly(
            grouped, keys, values, mask, distances, spec, head_shape=(*grouped.shape[:2], 1)
        )
    return output.permute(2, 0, 1, 3).flatten(1, 2)


def _is_plain(spec: AttentionSpec) -> bool:
    """Whether torch's own attention computes all of it."""
    return not spec.soft_cap and spec.alibi_slopes is None and spec.sinks is None


def _attend_explicitly(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    distances: torch.Tensor,
    spec: AttentionSpec,
    head_shape: tuple[int, ...] | torch.Size,
) -> torch.Tensor:
    """Attention as AttentionSpec defines it, in fp32.

    Args:
        query: [..., n, D]; keys, values: [..., length, D], in groups of any shape.
        mask: added to the scores [..., n, length].
        distances: tokens from each key to the query, of a shape that broadcasts to the scores'.
        head_shape: what the query heads are viewed as to broadcast, with one more dimension, to the scores.
    """
    scores = query.float() @ keys.float().transpose(-1, -2) * spec.scale
    if spec.soft_cap:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    if spec.alibi_slopes is not None:
        scores = scores - spec.alibi_slopes.view(*head_shape, 1) * distances
    if mask is not None:
        scores = scores + mask
    length = scores.shape[-1]
    if spec.sinks is not None:
        sinks = spec.sinks.float().view(*head_shape, 1)
        scores = torch.cat((scores, sinks.expand(*scores.shape[:-1], 1)), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :length]
    return (weights @ values.float()).to(query.dtype)
