"""Which checkpoint tensor belongs to which parameter of a model, and which are still missing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from engine.layers.experts import ExpertWeights
from engine.layers.linear_weight import LinearWeight
from engine.layers.weights import LoadableModule, ShardError
from engine.loader.blocks import dequantize
from engine.loader.misfits import Misfits, NotInModel, WrongTensor
from engine.loader.stream import StoredTensor
from engine.models.base import CausalLM


@dataclass(frozen=True, slots=True)
class _Target:
    """One parameter, or one shard of a fused parameter."""

    module: LoadableModule
    parameter: str
    shard: str | None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a checkpoint's tensor, or a part of it, belongs.

    Attributes:
        module, parameter, shard: what `LoadableModule.load_parameter` is called with.
        units: which of the equal parts of the tensor, along its outputs, in order; None for all of it.
        num_units: how many such parts it has.
    """

    module: LoadableModule
    parameter: str
    shard: str | None
    units: tuple[int, ...] | None = None
    num_units: int = 1


class LoadTargets:
    """The checkpoint tensors a model needs, by name; each is loaded exactly once.

    A tensor that a checkpoint keeps as one of several (`CheckpointNames.split`) is loaded as each of them.
    """

    def __init__(self, model: CausalLM) -> None:
        self._targets: dict[str, _Target] = {}
        self._names = model.names
        self._is_stage = model.stage.count > 1
        self._aliases: set[str] = set()
        # A tensor that a checkpoint may keep for all experts -> those of each.
        self._stacked: dict[str, tuple[str, ...]] = {}
        self._collect(model)
        self._fused = _fused_tensors(model, self._targets)
        self._loaded: dict[str, str] = {}

    def require_fit(self, checkpoint: str, files: Mapping[Path, Sequence[StoredTensor]]) -> None:
        """Checks, by names, shapes and dtypes alone, that a checkpoint's tensors are those of the model.

        Raises:
            ConfigError: some are missing, not part of the model, or of another shape or dtype; the message
                names them all, up to some of each kind.
        """
        misfits = Misfits()
        refused: set[str] = set()
        for path, tensors in files.items():
            for stored in tensors:
                try:
                    if self.wants(stored.name, str(path)):
                        shape_only = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
                        self.load(stored, shape_only, str(path))
                except NotInModel as error:
                    misfits.add(error)
                except WrongTensor as error:
                    misfits.add(error)
                    refused.update(error.targets)
        misfits.missing = sorted(self._targets.keys() - self._loaded.keys() - refused)
        self._loaded.clear()
        misfits.raise_if_any(checkpoint)

    def places(self, name: str) -> list[Place]:
        """Where a checkpoint's tensor belongs; nowhere if the model does not have it, or all experts' are in
        it."""
        if name in self._fused:
            layout = self._fused[name]
            num_units = sum(map(len, layout.values()))
            return [
                Place(target.module, target.parameter, target.shard, tuple(units), num_units)
                for target, units in ((self._targets[part], units) for part, units in layout.items())
            ]
        target = self._targets.get(name)
        return [] if target is None else [Place(target.module, target.parameter, target.shard)]

    def wants(self, name: str, source: str) -> bool:
        """Whether a checkpoint tensor is to be read, or carries nothing.

        Raises:
            NotInModel: the model has no such parameter.
            WrongTensor: it was loaded before, from the file that the message names.
        """
        for parts in (self._fused.get(name), self._stacked.get(name)):
            if parts is not None:
                return all(self.wants(part, source) for part in parts)
        if name not in self._targets:
            # Of a pipeline stage, what is not its own is another one's.
            if name in self._aliases or self._names.ignores(name) or self._is_stage:
                return False
            raise NotInModel(name, source)
        if name in self._loaded:
            raise WrongTensor(name, source, f"is in {self._loaded[name]} already", (name,))
        return True

    def load(self, stored: StoredTensor, tensor: torch.Tensor, source: str) -> None:
        """Puts a checkpoint tensor that is wanted where it belongs. One in blocks is dequantized where the
        parameter does not keep blocks.

        Raises:
            WrongTensor: its shape or the kind of its numbers is not the parameter's.
        """
        name = stored.name
        if name in self._fused:
            for part, piece in self._take_apart(name, tensor, source):
                self._load(part, piece, source, stored)
        elif name in self._stacked:
            parts = self._stacked[name]
            self._put(replace(self._targets[parts[0]], shard=None), tensor, source, stored, parts)
            self._loaded.update(dict.fromkeys(parts, source))
        else:
            self._load(name, tensor, source, stored)

    def _load(self, target_name: str, tensor: torch.Tensor, source: str, stored: StoredTensor) -> None:
        self._put(self._targets[target_name], tensor, source, stored, (target_name,))
        self._loaded[target_name] = source

    def _put(
        self, target: _Target, tensor: torch.Tensor, source: str, stored: StoredTensor, parts: Sequence[str]
    ) -> None:
        """Loads a checkpoint's tensor, which makes up the tensors `parts` of the model."""
        name, kept = stored.name, getattr(target.module, target.parameter)
        if stored.blocks and _is_plain_float(kept.dtype):
            tensor = dequantize(tensor, stored.blocks, kept.dtype)
        # A conversion between kinds would go through, and give numbers that mean nothing.
        if not _converts(tensor.dtype, kept.dtype):
            needed = "floating-point numbers" if _is_plain_float(kept.dtype) else _short(kept.dtype)
            fault = f"is of {_short(tensor.dtype)}; {needed} are needed"
            raise WrongTensor(name, source, fault, parts)
        try:
            target.module.load_parameter(target.parameter, tensor, target.shard)
        except ShardError as error:
            raise WrongTensor(name, source, str(error), parts) from error

    def _take_apart(self, name: str, tensor: torch.Tensor, source: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The names and contents of the tensors that a fused one holds. What does not extend along the output
        features, such as one scale for all of them, belongs to each."""
        layout = self._fused[name]
        num_units = sum(map(len, layout.values()))
        for part, units in layout.items():
            parameter = getattr(self._targets[part].module, self._targets[part].parameter)
            assert isinstance(parameter, LinearWeight), part
            if parameter.output is None:
                yield part, tensor
                continue
            dim = parameter.output.dim
            if dim >= tensor.dim() or tensor.shape[dim] % num_units:
                shape = list(tensor.shape)
                fault = f"has shape {shape}; a multiple of {num_units} is needed in dimension {dim}"
                raise WrongTensor(name, source, fault, layout)
            pieces = tensor.chunk(num_units, dim)
            yield part, torch.cat([pieces[unit] for unit in units], dim)

    def _collect(self, model: CausalLM) -> None:
        """Names every parameter as checkpoints do. A parameter shared by two modules (tied embeddings) is
        loaded under its first name; checkpoints that repeat it under the second are tolerated."""
        seen: set[nn.Parameter] = set()
        for path, module in model.named_modules():
            if not isinstance(module, LoadableModule):
                continue
            for parameter_name, parameter in module.named_parameters(recurse=False):
                own = parameter.file_name if isinstance(parameter, LinearWeight) else ""
                names = _checkpoint_names(model, path, module, own or parameter_name)
                if parameter in seen:
                    self._aliases.update(names)
                    continue
                seen.add(parameter)
                for name, shard in names.items():
                    self._targets[name] = _Target(module, parameter_name, shard)
                if isinstance(module, ExpertWeights) and module.checkpoint_shards:
                    stacked = model.names.tensor(module.layer_name, parameter_name)
                    self._stacked[stacked] = tuple(names)


def _converts(stored: torch.dtype, kept: torch.dtype) -> bool:
    """Whether numbers may be converted. Those of quantized formats are kept as they are: integers, whose bits
    may be several numbers, and floating-point numbers of a byte, which need a scale."""
    return stored == kept or (_is_plain_float(kept) and stored.is_floating_point)


def _is_plain_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1


def _fused_tensors(model: CausalLM, names: Collection[str]) -> dict[str, dict[str, Sequence[int]]]:
    """Fused checkpoint tensor -> the tensors of the model that it holds, with their units in it."""
    fused: dict[str, dict[str, Sequence[int]]] = {}
    layouts = {module: layout(model.config) for module, layout in model.names.split.items()}
    for name in names:
        path, _, parameter = name.rpartition(".")
        parent, _, own_name = path.rpartition(".")
        for module, layout in layouts.items():
            if own_name in layout:
                fused.setdefault(f"{parent}.{module}.{parameter}", {})[name] = layout[own_name]
    return fused


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checkpoint_names(
    model: CausalLM, path: str, module: LoadableModule, parameter: str
) -> dict[str, str | None]:
    """Checkpoint tensor name -> shard, for one parameter."""
    layer, names = module.layer_name or path, model.names
    if not module.checkpoint_shards:
        return {names.tensor(layer, parameter): None}
    return {names.tensor(layer, parameter, shard): shard for shard in module.checkpoint_shards}
