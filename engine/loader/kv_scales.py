"""Scales of an 8-bit KV cache, which checkpoints may hold."""

from __future__ import annotations

import re

import torch

from engine.layers.attention import Attention
from engine.loader.checkpoint import Checkpoint, readable
from engine.loader.stream import StoredTensor, read_exactly
from engine.models.base import CausalLM
from pagewire.base.errors import ConfigError

# A layer's number, and the scale's name: compressed-tensors' (".self_attn.k_scale", before
# ".k_proj.output_scale"), AutoFP8's (".kv_scale"), ModelOpt's (".k_proj.k_scale").
_SCALE = re.compile(r".*\.(\d+)\..*\b(k_scale|v_scale|kv_scale|k_proj\.output_scale|v_proj\.output_scale)$")


def load_kv_scales(model: CausalLM, checkpoint: Checkpoint) -> None:
    """Sets `kv_scales` of every attention layer to what the checkpoint has for it.

    Raises:
        ConfigError: a layer has a scale for each head, or a file cannot be read.
    """
    found: dict[int, tuple[float, float]] = {}
    for stored in (tensor for tensors in checkpoint.files.values() for tensor in tensors):
        match = _SCALE.match(stored.name)
        if match is None:
            continue
        layer, name = int(match[1]), match[2]
        key, value = found.get(layer, (1.0, 1.0))
        scale = _read(stored)
        # kv_scale is both's.
        found[layer] = (
            key if name.startswith("v_") else scale,
            value if name.startswith("k_") else scale,
        )
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    for number, layer_module in zip(model.stage.own(model.config.num_hidden_layers), layers, strict=True):
        layer_module.kv_scales = found.get(number, layer_module.kv_scales)


def _read(stored: StoredTensor) -> float:
    """A scale; one that is not positive stands for none."""
    values = bytearray(stored.num_bytes)
    with readable(stored.path), stored.path.open("rb", buffering=0) as file:
        read_exactly(file.fileno(), memoryview(values), stored, 0)
    scales = stored.view(torch.frombuffer(values, dtype=torch.uint8)).float().flatten()
    if len(scales) != 1:
        raise ConfigError(
            f"{stored.path}: {stored.name} has {len(scales)} scales; a KV cache of 8 bits is supported with "
            "one for each layer's keys and one for its values"
        )
    scale = float(scales[0])
    return scale if scale > 0 else 1.0
