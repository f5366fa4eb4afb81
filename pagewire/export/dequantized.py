"""A quantized checkpoint as plain tensors, by the same readers that serve it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from engine.layers.linear import LinearLayer
from engine.layers.linear_method import LinearShape
from engine.layers.linear_weight import LinearWeight, OutputShard
from engine.layers.parallel import FeatureRange
from engine.loader.checkpoint import Checkpoint
from engine.loader.quantized import names_of_quantized
from engine.loader.stream import StoredTensor
from engine.models.checkpoint_names import CheckpointNames
from engine.models.config import ModelConfig
from engine.quant.config import Quantization
from engine.quant.layouts.base import layouts_of
from engine.quant.methods.base import StoredShape
from engine.quant.methods.choose import METHODS
from engine.quant.products import LayoutProducts
from engine.quant.schemes import Awq, BnbTable, Gptq, PackedInts, Scheme, SqueezeLlm
from pagewire.base.errors import ConfigError
from pagewire.export.source import read_stored

_WORD = 32
# Ends of names of the tensors that hold the numbers of a quantized matrix.
_NUMBERS = ("qweight", "weight_packed", "weight")
_STATE = "weight.quant_state.bitsandbytes__"


class DequantizedSource:
    """The tensors that a quantized checkpoint stands for. Activations that its format quantizes are left as
    they are.

    Args:
        dtype: of what was quantized.

    Raises:
        ConfigError: its experts are in MXFP4.
    """

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, names: CheckpointNames, dtype: torch.dtype
    ) -> None:
        assert config.quantization is not None
        if not config.quantization.rules:
            raise ConfigError(
                f"{checkpoint.directory}: experts in MXFP4 cannot be written as plain weights; serve them as "
                "they are"
            )
        self._quantization: Quantization = config.quantization
        self._dtype = dtype
        extra = names_of_quantized(names, checkpoint, config)
        self._stored: Mapping[str, StoredTensor] = {
            each.name: each
            for tensors in checkpoint.files.values()
            for each in tensors
            if not extra.ignores(each.name) or names.ignores(each.name)
        }
        self._schemes = self._find_schemes()
        self.tensors: Sequence[StoredTensor] = list(self._plain())

    def find(self, layer: str, shard: str, tensor: str) -> StoredShape | None:
        """A tensor of a matrix; see StoredTensors. Layers are called as the checkpoint calls modules."""
        stored = self._stored.get(f"{layer}.{tensor}")
        return None if stored is None else StoredShape(stored.shape, stored.dtype)

    def read(self, name: str) -> torch.Tensor:
        module = name.removesuffix(".weight")
        if name == module or module not in self._schemes:
            return read_stored(self._stored[name])
        scheme = self._schemes[module]
        out_features, in_features = self._shape(module, scheme)
        shape = LinearShape(
            (OutputShard("", FeatureRange.whole(out_features)),), FeatureRange.whole(in_features)
        )
        layer = LinearLayer(module, shape, METHODS[type(scheme)](scheme, LayoutProducts(), self), bias=False)
        for own_name, parameter in list(layer.named_parameters(recurse=False)):
            assert isinstance(parameter, LinearWeight)
            file_name = f"{module}.{parameter.file_name or own_name}"
            if file_name in self._stored:
                layer.load_parameter(own_name, read_stored(self._stored[file_name]), None)
        layer.finish_loading()
        return torch.cat([layout.weight() for layout in layouts_of(layer)]).to(self._dtype)

    def _find_schemes(self) -> dict[str, Scheme]:
        found: dict[str, Scheme] = {}
        for name, stored in self._stored.items():
            module, _, part = name.rpartition(".")
            if part not in _NUMBERS or (stored.dtype.is_floating_point and stored.dtype.itemsize > 1):
                continue
            scheme = self._quantization.scheme_of([module])
            if scheme is not None:
                found[module] = scheme
        return found

    def _plain(self) -> list[StoredTensor]:
        plain, seen = [], set()
        for name, stored in self._stored.items():
            module = next((each for each in _prefixes(name) if each in self._schemes), None)
            if module is None or name == f"{module}.bias":
                plain.append(stored)
            elif module not in seen:
                seen.add(module)
                shape = self._shape(module, self._schemes[module])
                plain.append(replace(stored, name=f"{module}.weight", dtype=self._dtype, shape=shape))
        return plain

    def _shape(self, module: str, scheme: Scheme) -> tuple[int, int]:
        """[outputs, inputs] of a matrix, by the shape of its numbers."""
        if isinstance(scheme, Awq):
            rows, words = self._stored[f"{module}.qweight"].shape
            return words * 8, rows
        if isinstance(scheme, Gptq | SqueezeLlm):
            words, columns = self._stored[f"{module}.qweight"].shape
            return columns, words * _WORD // scheme.bits
        if isinstance(scheme, PackedInts):
            rows, words = self._stored[f"{module}.weight_packed"].shape
            return rows, words * _WORD // scheme.bits
        if isinstance(scheme, BnbTable):
            return self._shape_in_state(module)
        rows, columns = self._stored[f"{module}.weight"].shape
        return rows, columns

    def _shape_in_state(self, module: str) -> tuple[int, int]:
        for kind in ("nf4", "fp4"):
            stored = self._stored.get(f"{module}.{_STATE}{kind}")
            if stored is not None:
                rows, columns = json.loads(bytes(read_stored(stored).tolist()))["shape"]
                return int(rows), int(columns)
        raise ConfigError(f"{module} has no {_STATE}nf4, which says its shape")


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
