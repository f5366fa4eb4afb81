"""The Llama family: Llama 1 to 3.x, Mistral, Yi, SmolLM2, Qwen3 and their like.

Pre-norm decoder layers of grouped-query attention with rotary embedding and a gated feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from engine.attention.interface import AttentionSpec, HeadLayout, LayerKVCache, QKNorm, RotaryTable
from engine.layers.alibi import alibi_slopes
from engine.layers.attention import Attention
from engine.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from engine.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from engine.layers.norm import RMSNorm
from engine.layers.rotary import rotary_table
from engine.layers.step_context import StepContext
from engine.models.base import CausalLM, ModelContext
from engine.models.config import LayerConfig


class LlamaAttention(nn.Module):
    """Projections, rotation and attention of one layer."""

    def __init__(self, context: ModelContext, name: str, layer: LayerConfig) -> None:
        super().__init__()
        config, parallel = context.config, context.parallel
        self.qkv_proj = QKVParallelLinear(
            f"{name}.qkv_proj",
            config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            bias=config.qkv_bias,
            methods=context.linear_methods,
            parallel=context.parallel,
        )
        self.o_proj = RowParallelLinear(
            f"{name}.o_proj",
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=config.o_bias,
            methods=context.linear_methods,
            parallel=context.parallel,
        )
        heads = HeadLayout(self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads, config.head_dim)
        slopes = None
        if config.alibi:
            first = parallel.rank * heads.num_heads
            slopes = alibi_slopes(config.num_attention_heads)[first : first + heads.num_heads]
        spec = AttentionSpec(
            config.attention_scale,
            sliding_window=layer.sliding_window,
            soft_cap=config.attention_soft_cap,
            alibi_slopes=slopes,
        )
        rotary = None if layer.rotary is None else config.rotaries.index(layer.rotary)
        self.attention = Attention(heads, spec, rotary=rotary, kv_group=0, backend=context.backend)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, context.ops)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, context.ops)

    def forward(self, x: torch.Tensor, kv_cache: LayerKVCache, context: StepContext) -> torch.Tensor:
        norm = None
        if self.q_norm is not None and self.k_norm is not None:
            norm = QKNorm(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        attended = self.attention(self.qkv_proj(x, context), norm, kv_cache, context)
        output: torch.Tensor = self.o_proj(attended, context)
        return output


class LlamaMLP(nn.Module):
    """The gated feed-forward part of one layer."""

    def __init__(self, context: ModelContext, name: str) -> None:
        super().__init__()
        config = context.config
        self.gate_up_proj = MergedColumnParallelLinear(
            f"{name}.gate_up_proj",
            config.hidden_size,
            {"gate": config.intermediate_size, "up": config.intermediate_size},
            bias=config.mlp_bias,
            methods=context.linear_methods,
            parallel=context.parallel,
        )
        self.down_proj = RowParallelLinear(
            f"{name}.down_proj",
            config.intermediate_size,
            config.hidden_size,
            bias=config.mlp_bias,
            methods=context.linear_methods,
            parallel=context.parallel,
        )
        self.ops = context.ops

    def forward(self, x: torch.Tensor, context: StepContext) -> torch.Tensor:
        activated = self.ops.silu_and_mul(self.gate_up_proj(x, context))
        output: torch.Tensor = self.down_proj(activated, context)
        return output


class LlamaDecoderLayer(nn.Module):
    """One layer. The residual stream travels beside the activations, so that each norm adds and
    normalises in one place."""

    def __init__(self, context: ModelContext, name: str, layer: LayerConfig) -> None:
        super().__init__()
        config = context.config
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, context.ops)
        self.self_attn = LlamaAttention(context, f"{name}.self_attn", layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, context.ops)
        self.mlp = LlamaMLP(context, f"{name}.mlp")

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        kv_cache: LayerKVCache,
        context: StepContext,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, kv_cache, context)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x, context), residual


class LlamaModel(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        config = context.config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, ops=context.ops, parallel=context.parallel
        )
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(context, f"model.layers.{index}", layer)
            for index, layer in enumerate(config.layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, context.ops)

    def forward(
        self,
        token_ids: torch.Tensor,
        context: StepContext,
        kv_caches: Sequence[LayerKVCache],
    ) -> torch.Tensor:
        x: torch.Tensor = self.embed_tokens(token_ids)
        residual: torch.Tensor | None = None
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            x, residual = layer(x, residual, kv_cache, context)
        x, _ = self.norm(x, residual)
        return x


class LlamaForCausalLM(CausalLM):
    """The whole model; parameters named as in Hugging Face checkpoints."""

    fused: ClassVar = {
        "q_proj": ("qkv_proj", "q"),
        "k_proj": ("qkv_proj", "k"),
        "v_proj": ("qkv_proj", "v"),
        "gate_proj": ("gate_up_proj", "gate"),
        "up_proj": ("gate_up_proj", "up"),
    }
    # Old conversions saved the rotary frequencies, which are computed here.
    ignored: ClassVar = (".rotary_emb.inv_freq",)

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        self.config = config = context.config
        self.model = LlamaModel(context)
        self.lm_head = ParallelLMHead(
            "lm_head",
            config.vocab_size,
            config.hidden_size,
            methods=context.linear_methods,
            parallel=context.parallel,
            tied_to=self.model.embed_tokens if config.tie_word_embeddings else None,
        )
        self.rotary_tables = [
            RotaryTable(
                rotary_table(rotary.rotary_dim, context.max_model_len, rotary.theta, rotary.scaling),
                rotary.interleaved,
            )
            for rotary in config.rotaries
        ]
        self.num_kv_heads = self.model.layers[0].self_attn.qkv_proj.num_kv_heads  # type: ignore[assignment, union-attr]

    def forward(
        self,
        token_ids: torch.Tensor,
        context: StepContext,
        kv_caches: Sequence[LayerKVCache],
    ) -> torch.Tensor:
        hidden: torch.Tensor = self.model(token_ids, context, kv_caches)
        return hidden

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.lm_head(hidden)
        return logits
