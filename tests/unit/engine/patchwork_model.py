"""Families that no user has: Llama's weights, in layers that differ as those of real families do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.models import families
from engine.models.config import LayerConfig, ModelConfig, RotaryConfig
from engine.models.readers.fields import ConfigFields
from engine.models.readers.llama import read_llama
from tests.unit.engine.tiny_model import CONFIG, tensors, write_model

HEAD_DIM = 16
EPS = 1e-5
FAMILIES: dict[str, dict[str, Any]] = {
    "PatchworkForCausalLM": {
        "layers": (
            LayerConfig(rotary=RotaryConfig(rotary_dim=HEAD_DIM, theta=1e4), sliding_window=6),
            LayerConfig(rotary=None),
            LayerConfig(rotary=RotaryConfig(rotary_dim=8, theta=1e5, interleaved=True)),
        ),
        "attention_scale": 0.4,
        "attention_soft_cap": 1.5,
    },
    "AlibiForCausalLM": {
        "layers": (LayerConfig(rotary=None), LayerConfig(rotary=None, sliding_window=9)),
        "alibi": True,
    },
    # Three KV groups: Gemma's pattern, with as few layers as make it.
    "LocalForCausalLM": {
        "layers": (
            LayerConfig(rotary=RotaryConfig(rotary_dim=HEAD_DIM, theta=1e4), sliding_window=5),
            LayerConfig(rotary=RotaryConfig(rotary_dim=HEAD_DIM, theta=1e4), sliding_window=5),
            LayerConfig(rotary=RotaryConfig(rotary_dim=HEAD_DIM, theta=1e6)),
        ),
    },
    # One KV group, with a window: Mistral's.
    "WindowForCausalLM": {
        "layers": (LayerConfig(rotary=RotaryConfig(rotary_dim=HEAD_DIM, theta=1e4), sliding_window=20),) * 2,
    },
}


def write_patchwork(directory: Path, architecture: str, patch: pytest.MonkeyPatch) -> Path:
    """Makes the family known for as long as the patch lasts, and writes a random model of it."""

    def read(fields: ConfigFields, name: str, eos_sources: Mapping[str, Mapping[str, Any]]) -> ModelConfig:
        config = read_llama(fields, "LlamaForCausalLM", eos_sources)
        return replace(config, architecture=name, **FAMILIES[architecture])

    family = replace(families.FAMILIES["LlamaForCausalLM"], read_config=read)
    patch.setitem(families.FAMILIES, architecture, family)  # type: ignore[arg-type]
    return write_model(
        directory,
        architectures=[architecture],
        num_hidden_layers=len(FAMILIES[architecture]["layers"]),
        head_dim=HEAD_DIM,
        tie_word_embeddings=False,
    )


def naive_logits(architecture: str, token_ids: list[int]) -> torch.Tensor:
    """What the model of `write_patchwork` makes of a sequence, [tokens, vocabulary]: plainly, in fp64."""
    values = FAMILIES[architecture]
    layers = values["layers"]
    shape = {**CONFIG, "num_hidden_layers": len(layers), "head_dim": HEAD_DIM, "tie_word_embeddings": False}
    weights = {name: weight.double() for name, weight in tensors(shape).items()}
    num_heads, num_kv_heads = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
    positions = torch.arange(len(token_ids)).double()
    distances = positions[:, None] - positions
    x = weights["model.embed_tokens.weight"][token_ids]
    for index, layer in enumerate(layers):

        def linear(name: str, x: torch.Tensor, index: int = index) -> torch.Tensor:
            return x @ weights[f"model.layers.{index}.{name}.weight"].T

        normed = _norm(x, weights[f"model.layers.{index}.input_layernorm.weight"])
        query = linear("self_attn.q_proj", normed).unflatten(1, (num_heads, -1)).transpose(0, 1)
        key, value = (
            linear(f"self_attn.{name}_proj", normed)
            .unflatten(1, (num_kv_heads, -1))
            .transpose(0, 1)
            .repeat_interleave(num_heads // num_kv_heads, 0)
            for name in "kv"
        )
        query, key = _rotate(query, layer.rotary, positions), _rotate(key, layer.rotary, positions)
        scores = query @ key.transpose(1, 2) * values.get("attention_scale", HEAD_DIM**-0.5)
        if cap := values.get("attention_soft_cap"):
            scores = cap * torch.tanh(scores / cap)
        if values.get("alibi"):
            # Of four heads: 2^(-8/4) and its powers.
            scores = scores - (0.25 ** torch.arange(1, num_heads + 1))[:, None, None] * distances
        unseen = (distances < 0) | (distances >= (layer.sliding_window or len(token_ids)))
        weights_of = torch.softmax(scores.masked_fill(unseen, -torch.inf), dim=-1)
        x = x + linear("self_attn.o_proj", (weights_of @ value).transpose(0, 1).flatten(1))
        normed = _norm(x, weights[f"model.layers.{index}.post_attention_layernorm.weight"])
        gate, up = linear("mlp.gate_proj", normed), linear("mlp.up_proj", normed)
        x = x + linear("mlp.down_proj", torch.nn.functional.silu(gate) * up)
    return _norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def _rotate(heads: torch.Tensor, rotary: RotaryConfig | None, positions: torch.Tensor) -> torch.Tensor:
    """heads [H, T, D], each pair of channels a complex number."""
    if rotary is None:
        return heads
    count = rotary.rotary_dim // 2
    angles = positions[:, None] * rotary.theta ** (-torch.arange(count) / count)
    firsts = 2 * torch.arange(count) if rotary.interleaved else torch.arange(count)
    seconds = firsts + (1 if rotary.interleaved else count)
    turned = torch.complex(heads[..., firsts], heads[..., seconds])
    turned = turned * torch.polar(torch.ones_like(angles), angles)
    rotated = heads.clone()
    rotated[..., firsts], rotated[..., seconds] = turned.real, turned.imag
    return rotated
