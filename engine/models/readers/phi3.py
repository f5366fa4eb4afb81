"""config.json of Phi-3 and Phi-4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.models.config import ModelConfig
from engine.models.readers.decoder import read_decoder, read_heads
from engine.models.readers.fields import ConfigFields
from engine.models.readers.rope import read_rotary


def read_phi3(
    fields: ConfigFields, architecture: str, eos_sources: Mapping[str, Mapping[str, Any]]
) -> ModelConfig:
    """See families.ReadConfig."""
    _, _, head_dim = read_heads(fields)
    num_layers = fields.positive("num_hidden_layers")
    window = 0 if fields.get("sliding_window") is None else fields.positive("sliding_window")
    rotary = read_rotary(fields, head_dim)
    return read_decoder(fields, architecture, eos_sources, rotary, windows=[window] * num_layers)
