"""In which number format a checkpoint keeps each matrix of a model."""

from __future__ import annotations

import torch

from engine.loader.checkpoint import Checkpoint
from engine.models.checkpoint_names import CheckpointNames
from engine.models.config import ModelConfig

_PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class MatrixFormats:
    """Looks matrices up by the names that they have in the model."""

    def __init__(self, checkpoint: Checkpoint, names: CheckpointNames, config: ModelConfig) -> None:
        self._names, self._config = names, config
        self._formats = {
            stored.name: stored.blocks or _PLAIN.get(stored.dtype, "")
            for tensors in checkpoint.files.values()
            for stored in tensors
        }

    def __call__(self, layer: str, shard: str) -> str:
        """Such as "F32", "BF16" or "Q4_K"; "" where the checkpoint does not have the matrix, or not as plain
        numbers or blocks. See LinearMethods.for_matrix for the arguments."""
        modules = names_of(self._names, self._config, layer, shard)
        found = (self._formats.get(f"{module}.weight") for module in modules)
        return next((kind for kind in found if kind), "")


def names_of(names: CheckpointNames, config: ModelConfig, layer: str, shard: str) -> list[str]:
    """What a checkpoint may call a matrix: its own name, and those of modules that hold it and others."""
    own = names.module(layer, shard)
    parent, _, matrix = own.rpartition(".")
    return [own, *(f"{parent}.{fused}" for fused, layout in names.split.items() if matrix in layout(config))]
