"""Random weights, for measuring speed without a checkpoint."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from engine.layers.linear_weight import LinearWeight, MatrixPart
from engine.layers.norm import RMSNorm
from engine.layers.weights import LoadableModule
from engine.models.base import CausalLM
from engine.quant.methods.at_load import PlainWeight
from engine.quant.methods.base import KeptTensors

SCALE = 0.02
# Of the scales of integers and bytes: so small that sums over a layer's inputs stay finite in 16 bits.
SMALLEST_SCALE, LARGEST_SCALE = 0.001, 0.002
# The exponents of scales that are powers of two, plus 127.
SMALLEST_EXPONENT, LARGEST_EXPONENT = 117, 118


def load_dummy(model: CausalLM, seed: int) -> None:
    """Fills every parameter from a seeded generator on its own device: norms near one, integers from their
    whole range, scales of quantized weights small and positive, the rest near zero."""
    generators: dict[torch.device, torch.Generator] = {}
    for module in model.modules():
        if not isinstance(module, LoadableModule):
            continue
        mean = 1.0 if isinstance(module, RMSNorm) else 0.0
        for parameter in module.parameters(recurse=False):
            kept = parameter if isinstance(parameter, KeptTensors) else None
            device = parameter.device if kept is None else kept.device_of_layer
            if device not in generators:
                generators[device] = torch.Generator(device=device).manual_seed(seed)
            if kept is None:
                _fill(parameter, mean, generators[device])
            else:
                _fill_kept(module, kept, generators[device])


def _fill_kept(module: nn.Module, parameter: KeptTensors, generator: torch.Generator) -> None:
    """Of what is of any size, formats can do without all but the weights that are quantized at load."""
    if not isinstance(parameter, PlainWeight):
        return
    for part in cast(dict[str, MatrixPart], module.parts).values():
        values = torch.empty(part.outputs.size, part.inputs.size, device=generator.device)
        parameter.quantize(values.normal_(0.0, SCALE, generator=generator), part)


def _fill(parameter: nn.Parameter, mean: float, generator: torch.Generator) -> None:
    values = parameter.data
    if values.dtype is torch.bool:
        values.random_(0, 2, generator=generator)
    elif values.dtype is torch.uint8 and isinstance(parameter, LinearWeight) and parameter.is_scale:
        values.random_(SMALLEST_EXPONENT, LARGEST_EXPONENT + 1, generator=generator)
    elif not values.is_floating_point():
        values.view(-1).view(torch.uint8).random_(0, 256, generator=generator)
    elif isinstance(parameter, LinearWeight) and parameter.is_scale:
        values.uniform_(SMALLEST_SCALE, LARGEST_SCALE, generator=generator)
    elif values.itemsize > 1:
        values.normal_(mean, SCALE, generator=generator)
    else:  # torch draws no floating-point numbers of a byte
        drawn = torch.empty(values.shape, dtype=torch.float32, device=values.device)
        values.copy_(drawn.normal_(mean, 1.0, generator=generator))
