"""A model with an adapter merged into its weights, as PEFT's merge_and_unload has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from engine.loader.stream import StoredTensor
from engine.lora.adapter import Adapter, LoraMatrix
from engine.models.checkpoint_names import CheckpointNames
from engine.models.config import ModelConfig
from pagewire.base.errors import ConfigError
from pagewire.export.source import Source

_SHOWN = 5


class MergedSource:
    """The tensors of a model, what an adapter adds to them included: computed in fp32, in the model's own
    number format.

    A model that ties its output projection to its embedding gets a projection of its own where the adapter
    changes one of them alone, as it was while it was trained.

    Attributes:
        unties: whether it does.

    Raises:
        ConfigError: the adapter is of another model, or its embedding has DoRA's magnitudes.
    """

    def __init__(self, source: Source, adapter: Adapter, config: ModelConfig, names: CheckpointNames) -> None:
        self._source, self._adapter = source, adapter
        self._stored = {each.name: each for each in source.tensors}
        self._embedding = names.module("model.embed_tokens")
        self._head = names.module("lm_head")
        changed = {*adapter.matrices, *adapter.embeddings, *adapter.saved}
        is_tied = config.tie_word_embeddings and f"{self._head}.weight" not in self._stored
        self.unties = is_tied and bool(changed & {self._embedding, self._head})
        self._require_fit(changed)
        self.tensors: Sequence[StoredTensor] = list(self._all())

    def read(self, name: str) -> torch.Tensor:
        module, _, part = name.rpartition(".")
        adapter = self._adapter
        if part == "bias":
            return self._bias(name, module)
        if part != "weight":
            return self._source.read(name)
        if module in adapter.saved:
            return adapter.saved[module].to(self._dtype(name))
        base = self._source.read(self._base_name(name))
        if module in adapter.matrices:
            return adapter.matrices[module].merged(base).to(base.dtype)
        if module in adapter.embeddings:
            return (base.float() + adapter.embeddings[module].delta().T).to(base.dtype)
        return base

    def _bias(self, name: str, module: str) -> torch.Tensor:
        adapter = self._adapter
        if module in adapter.biases:
            bias = adapter.biases[module].float()
        elif name in self._stored:
            bias = self._source.read(name).float()
        else:
            bias = torch.zeros(self._stored[f"{module}.weight"].shape[0])
        matrix = adapter.matrices.get(module)
        if matrix is not None and matrix.bias is not None:
            bias = bias + matrix.bias
        return bias.to(self._dtype(name))

    def _dtype(self, name: str) -> torch.dtype:
        module = name.rpartition(".")[0]
        known = self._stored.get(name) or self._stored[self._base_name(f"{module}.weight")]
        return known.dtype

    def _base_name(self, name: str) -> str:
        """The base's tensor that a weight is made of: an output projection without one is the embedding."""
        return name if name in self._stored else f"{self._embedding}.weight"

    def _all(self) -> Iterator[StoredTensor]:
        yield from self._stored.values()
        if self.unties:
            yield replace(self._stored[f"{self._embedding}.weight"], name=f"{self._head}.weight")
        for module in self._with_bias():
            if f"{module}.bias" not in self._stored:
                weight = self._stored[f"{module}.weight"]
                yield replace(weight, name=f"{module}.bias", shape=weight.shape[:1])

    def _with_bias(self) -> Iterator[str]:
        yield from self._adapter.biases
        yield from (module for module, each in self._adapter.matrices.items() if each.bias is not None)

    def _require_fit(self, changed: set[str]) -> None:
        where = self._adapter.config.source
        if any(each.magnitude is not None for each in self._adapter.embeddings.values()):
            raise ConfigError(f"{where}: use_dora with an embedding cannot be merged")
        own = {name.rpartition(".")[0] for name in self._stored} | {self._head}
        if strange := sorted(changed - own):
            shown = ", ".join(strange[:_SHOWN]) + (", ..." if len(strange) > _SHOWN else "")
            raise ConfigError(f"{where}: the adapter changes {shown}, which the model does not have")
        for module, matrix in {**self._adapter.matrices, **self._adapter.embeddings}.items():
            self._require_shape(module, matrix)
        for module, tensor in self._adapter.saved.items():
            weight = self._stored[self._base_name(f"{module}.weight")]
            if tuple(tensor.shape) != weight.shape:
                raise ConfigError(
                    f"{where}: {module} has shape {list(tensor.shape)}, in the model {list(weight.shape)}"
                )

    def _require_shape(self, module: str, matrix: LoraMatrix) -> None:
        shape = self._stored[self._base_name(f"{module}.weight")].shape
        own = (matrix.b.shape[0], matrix.a.shape[1])
        if module in self._adapter.embeddings:
            own = (own[1], own[0])
        if own != shape:
            raise ConfigError(
                f"{self._adapter.config.source}: {module} is for a matrix of {list(own)}, in the model "
                f"it has {list(shape)}"
            )
