"""Paged attention with the project's own Triton kernels; all metadata is in device memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.attention.interface import (
    AttentionBackend,
    AttentionMetadata,
    AttentionSpec,
    HeadLayout,
    LayerKVCache,
    QKNorm,
    RotaryTable,
    Rotation,
)
from engine.kernels.paged_attention.decode import decode_splits, paged_decode_attention
from engine.kernels.paged_attention.prefill import (
    paged_prefill_attention,
    prefill_block_q,
    prefill_config,
)
from engine.kernels.paged_attention.prefix import (
    prefix_splits,
    prefix_workspace,
    shared_prefix_attention,
)
from engine.kernels.rotate_and_store.kernel import rotate_and_store

# Used without a GPU, under Triton's interpreter, where any number works.
_SMS_WITHOUT_DEVICE = 4


@dataclass(slots=True)
class TritonRotation(Rotation):
    """The rotary table and the positions that the kernel looks up in it."""

    table: RotaryTable
    positions: torch.Tensor


@dataclass(slots=True)
class PrefixMetadata:
    """A prefix that many decodes share, in device memory; see `shared_prefix_attention`.

    Attributes:
        row: a row that begins with the prefix, [1] int32.
        num_tokens: the prefix's length, [1] int32.
        lens: the prefix's length for each request that shares it, else 0, [S] int32.
    """

    row: torch.Tensor
    num_tokens: torch.Tensor
    lens: torch.Tensor


@dataclass(slots=True)
class TritonAttentionMetadata(AttentionMetadata):
    """A step's layout in device memory: `num_decodes` requests of one token, then chunks. S requests.

    Attributes:
        num_decodes: requests served by the decode kernel.
        rows: each request's row of the block table, -1 for padding, [S] int32.
        seq_lens: context length of each request including the step's tokens, 0 for padding, [S] int32.
        query_start_loc: where each request's tokens begin, and the end of the last, [S + 1] int32.
        tile_request, tile_start: see `prefill_tiles`, [num_tiles] int32.
        block_table: every row's block ids, [R, B] int32.
        prefix: the prefix that decodes share; None if they share none.
    """

    num_decodes: int
    rows: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    tile_request: torch.Tensor
    tile_start: torch.Tensor
    block_table: torch.Tensor
    prefix: PrefixMetadata | None = None


class TritonAttentionBackend(AttentionBackend):
    """See the module.

    Attributes:
        block_q: tokens of a chunk per attention tile.
        tile_decodes: whether decodes are computed as chunks of one token, by the same instructions as prefill
            chunks, so that a token's result depends neither on its batch nor on prefill or decode.
    """

    def __init__(
        self,
        heads: HeadLayout,
        *,
        max_num_seqs: int,
        device: torch.device,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
        deterministic: bool = False,
        num_sms: int | None = None,
    ) -> None:
        self.tile_decodes = deterministic
        self._config = prefill_config(heads.head_dim, dtype, cache_dtype)
        self.block_q = prefill_block_q(heads.num_heads, heads.num_kv_heads, self._config)
        self._num_sms = num_sms or _SMS_WITHOUT_DEVICE
        if device.type == "cuda":
            self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._workspace = prefix_workspace(
            max_num_seqs,
            heads.num_heads,
            heads.num_kv_heads,
            heads.head_dim,
            self._num_sms,
            self._config.block_m,
            device,
        )

    def rotation(self, table: RotaryTable, positions: torch.Tensor) -> TritonRotation:
        return TritonRotation(table, positions)

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        heads: HeadLayout,
        norm: QKNorm | None,
        rotation: Rotation | None,
        kv_cache: LayerKVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        assert rotation is None or isinstance(rotation, TritonRotation)
        query: torch.Tensor = rotate_and_store(
            qkv,
            None if rotation is None else rotation.positions,
            None if rotation is None else rotation.table.angles,
            kv_cache.key,
            kv_cache.value,
            metadata.slot_mapping,
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            q_norm=None if norm is None else norm.query,
            k_norm=None if norm is None else norm.key,
            eps=0.0 if norm is None else norm.eps,
            interleaved=rotation is not None and rotation.table.interleaved,
            kv_scales=kv_cache.scales,
        )
        if rotation is not None and rotation.table.query_scale is not None:
            scale = rotation.table.query_scale.index_select(0, rotation.positions)
            query.mul_(scale.view(-1, 1, 1))
        return query

    def forward(
        self,
        query: torch.Tensor,
        kv_cache: LayerKVCache,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        assert isinstance(metadata, TritonAttentionMetadata)
        out = query.new_empty(query.shape)
        num_decodes = 0 if self.tile_decodes else metadata.num_decodes
        if num_decodes:
            self._decode(query[:num_decodes], kv_cache, metadata, spec, out[:num_decodes])
        if len(metadata.tile_request):
            paged_prefill_attention(
                query,
                kv_cache.key,
                kv_cache.value,
                block_table=metadata.block_table,
                rows=metadata.rows,
                query_start_loc=metadata.query_start_loc,
                seq_lens=metadata.seq_lens,
                tile_request=metadata.tile_request,
                tile_start=metadata.tile_start,
                scale=spec.scale,
                sliding_window=spec.sliding_window,
                soft_cap=spec.soft_cap,
                alibi_slopes=spec.alibi_slopes,
                sinks=spec.sinks,
                kv_scales=kv_cache.scales,
                out=out,
            )
        return out

    def _decode(
        self,
        query: torch.Tensor,
        kv_cache: LayerKVCache,
        metadata: TritonAttentionMetadata,
        spec: AttentionSpec,
        out: torch.Tensor,
    ) -> None:
        num_seqs, num_heads, _ = query.shape
        num_kv_heads = kv_cache.key.shape[2]
        num_splits = decode_splits(num_seqs, num_kv_heads, self._num_sms)
        shared = None
        # If scores depend on the distance to the query, the prefix's scores differ between requests.
        if metadata.prefix is not None and not spec.sliding_window and spec.alibi_slopes is None:
            shared = shared_prefix_attention(
                query,
                kv_cache.key,
                kv_cache.value,
                block_table=metadata.block_table,
                prefix_row=metadata.prefix.row,
                prefix_len=metadata.prefix.num_tokens,
                prefix_lens=metadata.prefix.lens,
                scale=spec.scale,
                soft_cap=spec.soft_cap,
                num_splits=num_splits,
                num_prefix_splits=prefix_splits(
                    num_seqs, num_heads, num_kv_heads, self._num_sms, self._config.block_m
                ),
                kv_scales=kv_cache.scales,
                workspace=self._workspace,
            )
        paged_decode_attention(
            query,
            kv_cache.key,
            kv_cache.value,
            block_table=metadata.block_table,
            rows=metadata.rows,
            seq_lens=metadata.seq_lens,
            scale=spec.scale,
            sliding_window=spec.sliding_window,
            soft_cap=spec.soft_cap,
            alibi_slopes=spec.alibi_slopes,
            sinks=spec.sinks,
            kv_scales=kv_cache.scales,
            num_splits=num_splits,
            out=out,
            workspace=self._workspace,
            prefix=shared,
        )
