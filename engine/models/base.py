"""What the runner needs of every model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import torch
from torch import nn

from engine.attention.interface import AttentionBackend, LayerKVCache, RotaryTable
from engine.layers.adapters import AdapterBatch
from engine.layers.experts import ExpertMethod
from engine.layers.linear_method import LinearMethods
from engine.layers.ops import LayerOps
from engine.layers.parallel import TensorParallel
from engine.layers.step_context import StepContext
from engine.models.checkpoint_names import CheckpointNames
from engine.models.config import ModelConfig
from engine.models.stages import Stage
from engine.quant.products import LayoutProducts


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
        expert_methods: how its experts store their weights and multiply, by the weights' number format.
        layout_products: how its quantized linear layers multiply.
        stage: which of its layers are made.
    """

    config: ModelConfig
    max_model_len: int
    backend: AttentionBackend
    ops: LayerOps
    linear_methods: LinearMethods
    parallel: TensorParallel
    expert_methods: Mapping[str, ExpertMethod] = field(default_factory=dict)
    layout_products: LayoutProducts = field(default_factory=LayoutProducts)
    stage: Stage = field(default_factory=Stage)


class CausalLM(nn.Module, ABC):
    """A decoder-only language model.

    Attributes:
        names: what its checkpoints call its modules.
        num_kv_heads: key-value heads on this rank.
        adapter_tables: the slots whose adapters change the token embedding or the output projection.
        rotary_tables: one for each way in which layers rotate; a step context has the angles of each.
        stage: which of its layers are here.
        parallel: this rank.
    """

    names: CheckpointNames
    config: ModelConfig
    num_kv_heads: int
    rotary_tables: Sequence[RotaryTable] = ()
    adapter_tables: AbstractSet[int] = frozenset()
    stage: Stage = Stage()
    parallel: TensorParallel = TensorParallel()

    @abstractmethod
    def forward(
        self,
        token_ids: torch.Tensor,
        context: StepContext,
        kv_caches: Sequence[LayerKVCache],
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """token_ids [T] -> final hidden states [T, hidden]. Writes the KV caches, one for each layer.

        A pipeline stage after the first takes `hidden`, [T, hidden], of the stage before, and reads no
        tokens; one before the last returns what the next stage takes.
        """

    @abstractmethod
    def compute_logits(self, hidden: torch.Tensor, adapters: AdapterBatch | None = None) -> torch.Tensor:
        """hidden [S, hidden] -> logits [S, vocab_size] in the model's dtype; zeros if the model does not
        generate. `adapters` are those of the S hidden states; None where none has any."""

    def finish_pooled(self, states: torch.Tensor) -> torch.Tensor:
        """What requests with pooling get of their pooled states [n, hidden] fp32: the states themselves, or
        the logits [n, classes] fp32 of a classification head."""
        return states
