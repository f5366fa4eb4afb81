"""config.json of Baichuan 1 and 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from engine.models.config import ModelConfig
from engine.models.readers.decoder import read_decoder, read_heads
from engine.models.readers.fields import ConfigFields
from engine.models.readers.rope import read_rotary

_NAMES = {"max_position_embeddings": ("max_position_embeddings", "model_max_length")}
_VOCAB_OF_2 = 125696
_HIDDEN_SIZE_13B = 5120


def read_baichuan(
    fields: ConfigFields, architecture: str, eos_sources: Mapping[str, Mapping[str, Any]]
) -> ModelConfig:
    """See families.ReadConfig. The files do not say which positions the model knows: those of 13B, which
    has ALiBi, have a hidden size of 5120, and no `max_position_embeddings`."""
    hidden_size = fields.positive("hidden_size")
    has_alibi = hidden_size == _HIDDEN_SIZE_13B or "max_position_embeddings" not in fields.values
    fields = replace(fields, names=_NAMES)
    _, _, head_dim = read_heads(fields)
    return read_decoder(
        fields,
        architecture,
        eos_sources,
        None if has_alibi else read_rotary(fields, head_dim),
        alibi=has_alibi,
        normalise_head=fields.positive("vocab_size") == _VOCAB_OF_2,
    )
