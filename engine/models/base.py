"""What the runner needs of every model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from engine.attention.interface import AttentionBackend, LayerKVCache, RotaryTable
from engine.layers.linear_method import LinearMethods
from engine.layers.ops import LayerOps
from engine.layers.parallel import TensorParallel
from engine.layers.step_context import StepContext
from engine.models.config import ModelConfig
from engine.models.fused import FusedLayout


@dataclass(frozen=True, slots=True)
class ModelContext:
    """What every model is built from.

    Attributes:
        config: the model.
        max_model_len: positions it must serve.
        backend: how its attention layers attend.
        ops: how its layers compute what lies between.
        linear_methods: how each of its linear layers stores its weights and multiplies.
        parallel: this rank.
    """

    config: ModelConfig
    max_model_len: int
    backend: AttentionBackend
    ops: LayerOps
    linear_methods: LinearMethods
    parallel: TensorParallel


class CausalLM(nn.Module, ABC):
    """A decoder-only language model. Its parameters' names are those of its checkpoints, up to fusion.

    Attributes:
        fused: checkpoint module name -> (module here, shard of it), such as "q_proj" -> ("qkv_proj", "q").
        head, embedding: names of the checkpoint's tensors for the output projection and for the embedding
            that it may be tied to.
        split: of modules that checkpoints fuse, checkpoint module name -> how it holds those of `fused`, such
            as "W_pack" -> qkv_in_turn.
        ignored: suffixes of checkpoint tensors that carry nothing to load.
        num_kv_heads: key-value heads on this rank.
        rotary_tables: one for each way in which layers rotate; a step context has the angles of each.
    """

    fused: ClassVar[Mapping[str, tuple[str, str]]] = {}
    head: ClassVar[str] = "lm_head.weight"
    embedding: ClassVar[str] = "model.embed_tokens.weight"
    split: ClassVar[Mapping[str, Callable[[ModelConfig], FusedLayout]]] = {}
    ignored: ClassVar[tuple[str, ...]] = ()
    config: ModelConfig
    num_kv_heads: int
    rotary_tables: Sequence[RotaryTable] = ()

    @classmethod
    def checkpoint_module(cls, layer: str, shard: str) -> str:
        """What checkpoints call a layer, or one of the matrices of a fused layer.

        Args:
            layer: its full name here, such as "model.layers.3.self_attn.qkv_proj".
            shard: such as "q"; "" where the layer is not fused.
        """
        if not shard:
            return layer
        parent, _, own_name = layer.rpartition(".")
        parts = {place: name for name, place in cls.fused.items()}
        return f"{parent}.{parts[own_name, shard]}"

    @abstractmethod
    def forward(
        self,
        token_ids: torch.Tensor,
        context: StepContext,
        kv_caches: Sequence[LayerKVCache],
    ) -> torch.Tensor:
        """token_ids [T] -> final hidden states [T, hidden]. Writes the KV caches, one for each layer."""

    @abstractmethod
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [S, hidden] -> logits [S, vocab_size] in the model's dtype."""
