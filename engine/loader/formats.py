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
        self._names = names
        self._formats = {
            stored.name: stored.blocks or _PLAIN.get(stored.dtype, "")
            for tensors in checkpoint.files.values()
            for stored in tensors
        }
        # A matrix's own name -> the names of the fused modules that may hold it.
        self._fused: dict[str, list[str]] = {}
        for module, layout in names.split.items():
            for part in layout(config):
                self._fused.setdefault(part, []).append(module)

    def __call__(self, layer: str, shard: str) -> str:
        """Such as "F32", "BF16" or "Q4_K"; "" where the checkpoint does not have the matrix, or not as plain
        numbers or blocks. See LinearMethods.for_matrix for the arguments."""
        path = self._names.module(layer, shard)
        parent, _, own_name = path.rpartition(".")
        fused = (f"{parent}.{module}" for module in self._fused.get(own_name, ()))
        found = (self._formats.get(f"{module}.weight") for module in (path, *fused))
        return next((kind for kind in found if kind), "")
