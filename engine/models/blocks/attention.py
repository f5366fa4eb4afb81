"""The attention block: projections, what is done to queries and keys, and attention."""

from __future__ import annotations

import torch
from torch import nn

from engine.attention.interface import AttentionSpec, HeadLayout, LayerKVCache, QKNorm
from engine.layers.alibi import alibi_slopes
from engine.layers.attention import Attention
from engine.layers.linear import QKVParallelLinear, RowParallelLinear, head_channels
from engine.layers.norm import LayerNormOfHeads, RMSNorm, SplitRMSNorm
from engine.layers.parallel import FeatureRange
from engine.layers.step_context import StepContext
from engine.layers.weights import LoadableModule, copy_checked, take_part
from engine.models.base import ModelContext
from engine.models.config import LayerConfig
from engine.models.families import checkpoint_names


class SelfAttention(LoadableModule):
    """Grouped-query attention of one layer. Its heads are split over ranks."""

    def __init__(self, context: ModelContext, name: str, layer: LayerConfig) -> None:
        super().__init__()
        config, parallel = context.config, context.parallel
        self.layer_name = name
        self.qkv_proj = QKVParallelLinear(
            f"{name}.qkv_proj",
            config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            bias=config.qkv_bias,
            methods=context.linear_methods,
            parallel=parallel,
        )
        self.o_proj = RowParallelLinear(
            f"{name}.o_proj",
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=config.o_bias,
            methods=context.linear_methods,
            parallel=parallel,
            input_parts=head_channels(
                parallel, config.num_attention_heads, config.num_key_value_heads, config.head_dim
            ),
        )
        heads = HeadLayout(self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads, config.head_dim)
        share = parallel.share_heads(config.num_attention_heads, config.num_key_value_heads)
        self._first_head, self._all_heads = share.heads.first, config.num_attention_heads
        slopes = None
        if config.alibi:
            slopes = alibi_slopes(self._all_heads)[self._first_head :][: heads.num_heads]
        self.sinks: nn.Parameter | None = None
        if config.attention_sinks:
            self.sinks = nn.Parameter(torch.empty(heads.num_heads), requires_grad=False)
        spec = AttentionSpec(
            config.attention_scale,
            sliding_window=layer.sliding_window,
            soft_cap=config.attention_soft_cap,
            alibi_slopes=slopes,
            sinks=self.sinks,
        )
        rotary = None if layer.rotary is None else config.rotaries.index(layer.rotary)
        self.attention = Attention(heads, spec, rotary=rotary, kv_group=0, backend=context.backend)
        self._q_size, self._kv_size = (
            count * heads.head_dim for count in (heads.num_heads, heads.num_kv_heads)
        )
        self.q_norm: RMSNorm | LayerNormOfHeads | None = None
        self.k_norm: RMSNorm | LayerNormOfHeads | None = None
        self._norms_heads = config.qk_norm == "heads"
        if config.qk_norm:
            held = self.qkv_proj.held
            self.q_norm = _make_norm(context, f"{name}.q_norm", held["q"], 1)
            self.k_norm = _make_norm(context, f"{name}.k_norm", held["k"], share.kv_replicas)

    def load_parameter(self, name: str, tensor: torch.Tensor, shard: str | None) -> None:
        assert self.sinks is not None, name
        num_heads = len(self.sinks)
        copy_checked(self.sinks, take_part(tensor, 0, self._first_head, num_heads, self._all_heads))

    def forward(self, x: torch.Tensor, kv_cache: LayerKVCache, context: StepContext) -> torch.Tensor:
        """x [T, hidden] -> what the layer adds to it, [T, hidden]."""
        qkv: torch.Tensor = self.qkv_proj(x, context)
        norm = None
        if self.q_norm is not None and self.k_norm is not None:
            if self._norms_heads:
                norm = QKNorm(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
            else:
                query, key, value = torch.split(qkv, [self._q_size, self._kv_size, self._kv_size], dim=-1)
                qkv = torch.cat((self.q_norm.normalise(query), self.k_norm.normalise(key), value), dim=-1)
        attended = self.attention(qkv, norm, kv_cache, context)
        output: torch.Tensor = self.o_proj(attended, context)
        return output


def _make_norm(
    context: ModelContext, name: str, held: FeatureRange, replicas: int
) -> RMSNorm | LayerNormOfHeads:
    """The norm of queries, or of keys, of which this rank and `replicas` - 1 others hold these channels."""
    config, head_dim = context.config, context.config.head_dim
    if config.qk_norm == "layer":
        heads = FeatureRange(held.first // head_dim, held.size // head_dim, held.total // head_dim)
        is_split = checkpoint_names(config.architecture).head_norms_are_split
        return LayerNormOfHeads(name, heads, head_dim, config.norm.eps, context.ops, is_split=is_split)
    if config.qk_norm == "projection" and context.parallel.size > 1:
        return SplitRMSNorm(held, config.norm.eps, context.ops, context.parallel, replicas)
    size = head_dim if config.qk_norm == "heads" else held.size
    return RMSNorm(size, config.norm.eps, context.ops, one_plus=config.norm.one_plus)
