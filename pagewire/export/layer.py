"""One decoder layer of a model, by itself: its matrices by name, and what it makes of activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from engine.attention.interface import BatchLayout, LayerKVCache
from engine.cpu.attention import TorchAttentionBackend
from engine.cpu.ops import TorchLayerOps
from engine.layers.experts import ExpertWeights
from engine.layers.linear import LinearLayer
from engine.layers.linear_method import SameMethod
from engine.layers.parallel import TensorParallel
from engine.layers.step_context import StepContext
from engine.loader.stream import StoredTensor
from engine.loader.targets import LoadTargets
from engine.models.base import CausalLM, ModelContext
from engine.models.checkpoint_names import CheckpointNames
from engine.models.config import ModelConfig
from engine.models.decoder import DecoderLayer, make_rotary_table
from engine.models.stages import Stage
from pagewire.export.statistics import InputKey, RecordedExperts, RecordedMethod, Recorder

_BLOCK_SIZE = 16
# Ends of our names of matrices that no format quantizes.
_ROUTERS = (".router", ".shared_expert_gate")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix of a checkpoint that belongs to a linear layer.

    Attributes:
        module: what the checkpoint calls it.
        shape: [outputs, inputs].
        layer: our name of the linear layer that it is in, such as "model.layers.3.self_attn.qkv_proj".
        expert: whose matrix it is; None where there are none.
        parts: which of its `num_units` equal parts along the outputs are the layer's "q", "gate" and so on;
            "" for the whole of a layer that is not fused.
    """

    module: str
    shape: tuple[int, int]
    layer: str
    expert: int | None
    parts: Mapping[str, tuple[int, ...]]
    num_units: int

    @property
    def inputs(self) -> InputKey:
        """Where a recorder sees its inputs."""
        return self.layer, self.expert

    @property
    def weight(self) -> str:
        """The name of its tensor."""
        return f"{self.module}.weight"

    def rows(self, part: str) -> torch.Tensor:
        """The rows that are a part, in the part's own order."""
        size = self.shape[0] // self.num_units
        units = torch.tensor(self.parts[part])
        return (units[:, None] * size + torch.arange(size)).flatten()


class _OneLayer(nn.Module):
    """A model that has nothing but one layer, under the name that it has in the whole one."""

    def __init__(self, layer: nn.Module, index: int, config: ModelConfig, names: CheckpointNames) -> None:
        super().__init__()
        self.config, self.names = config, names
        self.stage = Stage(layers=range(index, index + 1))
        self.model = nn.Module()
        self.model.add_module("layers", nn.ModuleDict({str(index): layer}))


@dataclass(slots=True)
class LayerBuilder:
    """Makes layers of one model.

    Attributes:
        config: the model's; its quantization is not looked at.
        names: what its checkpoint calls modules.
        device: where layers compute, in fp32.
        length: positions that they compute.
    """

    config: ModelConfig
    names: CheckpointNames
    device: torch.device
    length: int
    recorder: Recorder = field(default_factory=Recorder)

    def prefix(self, index: int) -> str:
        """How the names of a layer's tensors begin."""
        return self.names.module(f"model.layers.{index}") + "."

    def make(self, index: int, tensors: Sequence[StoredTensor], where: str) -> Layer:
        """A layer whose weights are yet to be loaded.

        Args:
            tensors: the layer's, as the checkpoint has them.
            where: the checkpoint, for errors.

        Raises:
            ConfigError: they are not those of the layer.
        """
        backend = TorchAttentionBackend(self.device, torch.float32)
        context = ModelContext(
            config=replace(self.config, quantization=None),
            max_model_len=self.length,
            backend=backend,
            ops=TorchLayerOps(self.device),
            linear_methods=SameMethod(RecordedMethod(self.recorder)),
            parallel=TensorParallel(),
            expert_methods={"": RecordedExperts(self.recorder)},
        )
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with self.device:
                module = DecoderLayer(context, f"model.layers.{index}", self.config.layers[index])
                tables = [make_rotary_table(context, rotary) for rotary in self.config.rotaries]
        finally:
            torch.set_default_dtype(default)
        targets = LoadTargets(cast(CausalLM, _OneLayer(module, index, self.config, self.names)))
        targets.require_fit(where, {Path(where): tensors})
        return Layer(index, module, targets, tensors, backend, self, tables)


@dataclass(slots=True)
class Layer:
    """A layer, ready to be loaded."""

    index: int
    module: DecoderLayer
    targets: LoadTargets
    tensors: Sequence[StoredTensor]
    _backend: TorchAttentionBackend
    _builder: LayerBuilder
    _tables: Sequence[Any]

    def load(self, name: str, tensor: torch.Tensor) -> None:
        """Puts a tensor of the checkpoint, plain numbers, where it belongs."""
        if self.targets.places(name) or not self._builder.names.ignores(name):
            stored = next(each for each in self.tensors if each.name == name)
            self.targets.load(stored, tensor, "")

    def matrices(self) -> list[Matrix]:
        """Those that may be quantized, in the checkpoint's order."""
        found = []
        for stored in self.tensors:
            module, _, own_name = stored.name.rpartition(".")
            if own_name != "weight" or len(stored.shape) != 2:
                continue
            places = self.targets.places(stored.name)
            if not places or not isinstance(places[0].module, LinearLayer | ExpertWeights):
                continue
            layer = places[0].module.layer_name
            if layer.endswith(_ROUTERS):
                continue
            expert, parts = None, {}
            for place in places:
                number, _, part = (place.shard or "").rpartition(".")
                expert = int(number) if number else None
                parts[part] = place.units or (0,)
            out_features, in_features = stored.shape
            shape = (out_features, in_features)
            found.append(Matrix(module, shape, layer, expert, parts, places[0].num_units))
        return found

    def routers(self) -> list[str]:
        """What the checkpoint calls the linear layers that no format quantizes."""
        found = []
        for stored in self.tensors:
            module, _, own_name = stored.name.rpartition(".")
            places = self.targets.places(stored.name)
            if own_name != "weight" or not places or not isinstance(places[0].module, LinearLayer):
                continue
            if places[0].module.layer_name.endswith(_ROUTERS):
                found.append(module)
        return found

    def run(self, hidden: torch.Tensor, length: int) -> torch.Tensor:
        """What the layer makes of several texts of `length` tokens each, [T, hidden] fp32 -> the same."""
        count = len(hidden) // length
        blocks = -(-length // _BLOCK_SIZE)
        positions = np.tile(np.arange(length), count)
        owner = np.repeat(np.arange(count), length)
        layout = BatchLayout(
            counts=np.full(count, length),
            seq_lens=np.full(count, length),
            block_table=np.arange(count * blocks).reshape(count, blocks),
            slot_mapping=(owner * blocks + positions // _BLOCK_SIZE) * _BLOCK_SIZE + positions % _BLOCK_SIZE,
            block_size=_BLOCK_SIZE,
        )
        heads = self.module.self_attn.attention.heads
        size = (count * blocks, _BLOCK_SIZE, heads.num_kv_heads, heads.head_dim)
        cache = LayerKVCache(hidden.new_zeros(size), hidden.new_zeros(size))
        where = torch.from_numpy(positions).to(hidden.device)
        context = StepContext(
            where,
            attention=[self._backend.prepare(layout)],
            rotations=[self._backend.rotation(table, where) for table in self._tables],
        )
        # Layers add to the stream in place.
        added, stream = self.module(hidden.clone(), None, cache, context)
        return cast(torch.Tensor, added + stream)
