"""A decoder-only language model. Every family is this one, made of the parts that its configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from engine.attention.interface import LayerKVCache, RotaryTable
from engine.layers.adapters import AdapterBatch
from engine.layers.classifier import ClassificationHead
from engine.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from engine.layers.norm import Norm, make_norm
from engine.layers.rotary import log_query_scale, rotary_table
from engine.layers.step_context import StepContext
from engine.models.base import CausalLM, ModelContext
from engine.models.blocks.attention import SelfAttention
from engine.models.blocks.experts import ExpertMLP
from engine.models.blocks.feed_forward import GatedMLP
from engine.models.config import LayerConfig, RotaryConfig
from engine.models.families import checkpoint_names


class DecoderLayer(nn.Module):
    """One layer. The residual stream travels beside the activations, so that each norm adds and normalises in
    one place."""

    def __init__(self, context: ModelContext, name: str, layer: LayerConfig) -> None:
        super().__init__()
        config = context.config
        self.self_attn = SelfAttention(context, f"{name}.self_attn", layer)
        self.mlp: nn.Module
        if layer.experts is None:
            self.mlp = GatedMLP(context, f"{name}.mlp", config.intermediate_size)
        else:
            self.mlp = ExpertMLP(context, f"{name}.mlp", layer.experts)
        self.attn_norm: Norm | None = None
        self.mlp_norm: Norm | None = None
        if config.norm_inputs:
            self.attn_norm = _make_norm(context)
            if not config.parallel_residual:
                self.mlp_norm = _make_norm(context)
        self.attn_out_norm = _make_norm(context) if config.norm_outputs else None
        self.mlp_out_norm = _make_norm(context) if config.norm_outputs else None
        self.parallel_residual = config.parallel_residual
        self.residual_scale = config.residual_scale
        self.ops = context.ops

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        kv_cache: LayerKVCache,
        context: StepContext,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, hidden] is yet to be added to the residual stream [T, hidden], and so is what is returned."""
        x, residual = _enter(self.attn_norm, x, residual)
        attended = self._leave(self.attn_out_norm, self.self_attn(x, kv_cache, context))
        if self.parallel_residual:
            return attended + self._leave(self.mlp_out_norm, self.mlp(x, context)), residual
        x, residual = _enter(self.mlp_norm, attended, residual)
        return self._leave(self.mlp_out_norm, self.mlp(x, context)), residual

    def _leave(self, norm: Norm | None, x: torch.Tensor) -> torch.Tensor:
        """What a part adds to the residual stream."""
        if norm is not None:
            x = norm.normalise(x)
        return x if self.residual_scale == 1.0 else self.ops.scale(x, self.residual_scale)


def _make_norm(context: ModelContext) -> Norm:
    return make_norm(context.config.hidden_size, context.config.norm, context.ops)


def _enter(
    norm: Norm | None, x: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds x to the residual stream. Returns what the next part reads, and the stream."""
    if norm is not None:
        return norm.forward(x, residual)
    x = x if residual is None else residual + x
    return x, x


def make_rotary_table(context: ModelContext, rotary: RotaryConfig) -> RotaryTable:
    """The angles of the layers that rotate so, at every position that is served."""
    length, start = context.max_model_len, context.config.log_query_positions
    return RotaryTable(
        rotary_table(rotary.rotary_dim, length, rotary.theta, rotary.scaling),
        rotary.interleaved,
        log_query_scale(length, start) if 0 < start < length else None,
    )


class DecoderModel(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        config = context.config
        stage = context.stage
        self.embed_tokens: VocabParallelEmbedding | None = None
        if stage.is_first or (stage.is_last and config.tie_word_embeddings):
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size,
                config.hidden_size,
                ops=context.ops,
                parallel=context.parallel,
                table=context.linear_methods.for_table("model.embed_tokens"),
            )
        own = stage.own(len(config.layers))
        # Layers of other stages are nothing here, so that those of this one have their numbers.
        self.layers = nn.ModuleList(
            DecoderLayer(context, f"model.layers.{index}", layer) if index in own else nn.Identity()
            for index, layer in enumerate(config.layers)
        )
        self.own_layers = cast(list[DecoderLayer], list(self.layers[own.start : own.stop]))
        self.norm = _make_norm(context) if stage.is_last else None
        # As a tensor of the model's number format holds it, which is what Gemma was trained with.
        scale = torch.tensor(config.embedding_scale, device="cpu")
        self.embedding_scale = scale.to(torch.get_default_dtype()).item()
        self.ops = context.ops

    def forward(
        self,
        token_ids: torch.Tensor,
        context: StepContext,
        kv_caches: Sequence[LayerKVCache],
        hidden: torch.Tensor | None,
    ) -> torch.Tensor:
        """See CausalLM.forward."""
        x = self._embed(token_ids, context) if hidden is None else hidden
        residual: torch.Tensor | None = None
        for layer, kv_cache in zip(self.own_layers, kv_caches, strict=True):
            x, residual = layer(x, residual, kv_cache, context)
        output: torch.Tensor = x
        if self.norm is not None:
            output, _ = self.norm(x, residual)
        elif residual is not None:
            output = residual + x
        return output

    def _embed(self, token_ids: torch.Tensor, context: StepContext) -> torch.Tensor:
        assert self.embed_tokens is not None
        x: torch.Tensor = self.embed_tokens(token_ids, context)
        if self.embedding_scale != 1.0:
            x = self.ops.scale(x, self.embedding_scale)
        return x


class Decoder(CausalLM):
    """The whole model."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        self.config = config = context.config
        self.names = checkpoint_names(config.architecture)
        self.model = DecoderModel(context)
        self.stage, self.parallel = context.stage, context.parallel
        stage = context.stage
        self.lm_head = self._make_lm_head(context) if config.has_lm_head and stage.is_last else None
        self.score = None
        if config.labels and stage.is_last:
            self.score = ClassificationHead(len(config.labels), config.hidden_size)
        self.rotary_tables = [make_rotary_table(context, rotary) for rotary in config.rotaries]
        self.num_kv_heads = self.model.own_layers[0].self_attn.qkv_proj.num_kv_heads

    def forward(
        self,
        token_ids: torch.Tensor,
        context: StepContext,
        kv_caches: Sequence[LayerKVCache],
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        output: torch.Tensor = self.model(token_ids, context, kv_caches, hidden)
        return output

    def compute_logits(self, hidden: torch.Tensor, adapters: AdapterBatch | None = None) -> torch.Tensor:
        config = self.config
        if self.lm_head is None:  # asked for all the same by rehearsals, and for slots that sample nothing
            return hidden.new_zeros(len(hidden), config.vocab_size)
        logits: torch.Tensor = self.lm_head.logits(hidden, adapters)
        if config.logit_scale != 1.0 or config.logit_soft_cap:
            logits = self.model.ops.scale(logits, config.logit_scale, config.logit_soft_cap)
        return logits

    def finish_pooled(self, states: torch.Tensor) -> torch.Tensor:
        return states if self.score is None else self.score(states)

    def _make_lm_head(self, context: ModelContext) -> ParallelLMHead:
        config = context.config
        return ParallelLMHead(
            "lm_head",
            config.vocab_size,
            config.hidden_size,
            methods=context.linear_methods,
            parallel=context.parallel,
            tied_to=self.model.embed_tokens if config.tie_word_embeddings else None,
            normalised=config.normalise_head,
        )
