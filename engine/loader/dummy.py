"""Random weights, for measuring speed without a checkpoint."""

from __future__ import annotations

import torch

from engine.layers.norm import RMSNorm
from engine.layers.weights import LoadableModule
from engine.models.base import CausalLM

SCALE = 0.02


def load_dummy(model: CausalLM, seed: int) -> None:
    """Fills every parameter from a seeded generator on its own device: norms near one, the rest near zero."""
    generators: dict[torch.device, torch.Generator] = {}
    for module in model.modules():
        if not isinstance(module, LoadableModule):
            continue
        mean = 1.0 if isinstance(module, RMSNorm) else 0.0
        for parameter in module.parameters(recurse=False):
            device = parameter.device
            if device not in generators:
                generators[device] = torch.Generator(device=device).manual_seed(seed)
            parameter.data.normal_(mean, SCALE, generator=generators[device])
