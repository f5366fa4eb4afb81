"""The keys of a GGUF file, from a model's configuration, checked by reading them back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.models.config import ModelConfig, RotaryConfig
from engine.models.families import parse_model_config
from pagewire.base.errors import ConfigError
from pagewire.export.gguf_tokenizer import add_tokenizer
from pagewire.hub.gguf.architectures import ARCHITECTURES, Architecture, find_architecture
from pagewire.hub.gguf.config import model_config
from pagewire.hub.gguf.keys import ModelKeys, ModelSizes, model_sizes
from pagewire.hub.gguf.layout import Plan, plan_tensors
from pagewire.hub.gguf.reader import GgufFile, GgufTensor
from pagewire.hub.gguf.rope import LLAMA3_DIVISORS, LONG_DIVISORS, SHORT_DIVISORS

# Classes whose tensors and keys llama.cpp gives the name of another.
_SAME_AS = {"MistralForCausalLM": "LlamaForCausalLM", "BaiChuanForCausalLM": "BaichuanForCausalLM"}
_MIXTRAL = "MixtralForCausalLM"
# Of a configuration, what no key says and nothing that is computed depends on.
_NOT_COMPARED = ("architecture", "dtype", "eos_token_ids", "quantization", "labels")

Divisors = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class GgufModel:
    """What a GGUF file will hold.

    Attributes:
        name: its `general.architecture`.
        metadata: its keys.
        plans: where its tensors come from.
        divisors: tensors of rotary frequencies.
    """

    name: str
    metadata: Mapping[str, Any]
    plans: list[Plan]
    divisors: Divisors


def describe(
    directory: Path, values: Mapping[str, Any], config: ModelConfig, tensors: frozenset[str]
) -> GgufModel:
    """The file that stands for a model.

    Args:
        directory: the model's, with its tokenizer.
        values: its config.json.
        tensors: names of its tensors.

    Raises:
        ConfigError: GGUF has no place for something that the model needs.
    """
    name = _architecture_name(directory, config)
    divisors = _divisors(config)
    metadata = _keys(name, config, values)
    metadata |= add_tokenizer(directory, values, config.vocab_size)
    # As the reader will see it: first which of several layouts it is, by the tensors that are there.
    architecture, sizes = _layout(directory, name, metadata, config, tensors)
    read = {**_flags(architecture, tensors, values), "tie_word_embeddings": config.tie_word_embeddings}
    plans = plan_tensors(architecture, sizes, read)
    _require_same(directory, name, metadata, config, plans, divisors)
    return GgufModel(name, metadata, plans, divisors)


def _architecture_name(directory: Path, config: ModelConfig) -> str:
    wanted = _SAME_AS.get(config.architecture, config.architecture)
    if wanted == _MIXTRAL:
        return "llama"
    for name, architecture in ARCHITECTURES.items():
        if architecture.class_name == wanted and not architecture.packed:
            return name
    known = sorted(
        {row.class_name for row in ARCHITECTURES.values() if not row.packed} | {*_SAME_AS, _MIXTRAL}
    )
    raise ConfigError(
        f"{directory}: {config.architecture} cannot be written as GGUF; supported are {', '.join(known)}"
    )


def _keys(name: str, config: ModelConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    # Layers that see all of their context come first, where others rotate otherwise.
    layers = sorted(config.layers, key=lambda layer: layer.sliding_window)
    rotary = next((layer.rotary for layer in layers if layer.rotary is not None), None)
    keys: dict[str, Any] = {
        "block_count": len(config.layers),
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size * (2 if name == "qwen" else 1),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon"
        if config.norm.kind == "rms"
        else "attention.layer_norm_epsilon": config.norm.eps,
    }
    if rotary is not None:
        keys |= _rotary_keys(config, rotary)
    keys |= _expert_keys(config)
    keys |= _window_keys(name, config)
    if name == "granite":
        keys |= {
            "embedding_scale": config.embedding_scale,
            "residual_scale": config.residual_scale,
            "attention.scale": config.attention_scale,
            "logit_scale": float(values.get("logits_scaling") or 1.0),
        }
    elif name in ("command-r", "cohere2"):
        keys["logit_scale"] = config.logit_scale
    if config.attention_soft_cap:
        keys["attn_logit_softcapping"] = config.attention_soft_cap
    if config.logit_soft_cap:
        keys["final_logit_softcapping"] = config.logit_soft_cap
    return {"general.architecture": name, **{f"{name}.{key}": value for key, value in keys.items()}}


def _rotary_keys(config: ModelConfig, rotary: RotaryConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {"rope.freq_base": rotary.theta, "rope.dimension_count": rotary.rotary_dim}
    others = [each for each in config.rotaries if each != rotary]
    if others:
        keys["rope.freq_base_swa"] = others[0].theta
    scaling = rotary.scaling
    if scaling is not None and scaling.kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
    if scaling is not None and scaling.kind == "yarn":
        usual = 0.1 * math.log(scaling.factor) + 1.0
        keys |= {
            "rope.scaling.original_context_length": scaling.original_max_position,
            "rope.scaling.yarn_beta_fast": scaling.beta_fast,
            "rope.scaling.yarn_beta_slow": scaling.beta_slow,
        }
        if not math.isclose(usual, scaling.attention_factor, rel_tol=1e-6):
            keys["rope.scaling.yarn_attn_factor"] = scaling.attention_factor
    if scaling is not None and scaling.kind == "longrope":
        keys |= {
            "rope.scaling.original_context_length": scaling.original_max_position,
            "rope.scaling.attn_factor": scaling.attention_factor,
        }
    return keys


def _divisors(config: ModelConfig) -> Divisors:
    """What GGUF has as tensors: the divisor of each frequency."""
    scaling = next((each.scaling for each in config.rotaries if each.scaling is not None), None)
    if scaling is not None and scaling.kind == "longrope":
        return {
            LONG_DIVISORS: np.array(scaling.long_factors, np.float32),
            SHORT_DIVISORS: np.array(scaling.short_factors, np.float32),
        }
    if scaling is None or scaling.kind != "llama3":
        return {}
    rotary = next(each for each in config.rotaries if each.scaling is scaling)
    frequency = rotary.theta ** -(np.arange(0, rotary.rotary_dim, 2) / rotary.rotary_dim)
    turns = scaling.original_max_position * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return {LLAMA3_DIVISORS: (1 / ((1 - smooth) / scaling.factor + smooth)).astype(np.float32)}


def _expert_keys(config: ModelConfig) -> dict[str, Any]:
    experts = next((layer.experts for layer in config.layers if layer.experts is not None), None)
    if experts is None:
        return {}
    keys: dict[str, Any] = {
        "expert_count": experts.num_experts,
        "expert_used_count": experts.top_k,
        "expert_feed_forward_length": experts.intermediate_size,
    }
    if experts.shared_size:
        keys["expert_shared_feed_forward_length"] = experts.shared_size
    keys["expert_weights_norm"] = experts.renormalise
    return keys


def _window_keys(name: str, config: ModelConfig) -> dict[str, Any]:
    window = max((layer.sliding_window for layer in config.layers), default=0)
    if not window or name in ("llama", "qwen2", "qwen3"):
        return {}
    keys: dict[str, Any] = {"attention.sliding_window": window}
    if name in ("gemma2", "gemma3", "cohere2"):
        keys["attention.sliding_window_pattern"] = [layer.sliding_window > 0 for layer in config.layers]
    return keys


def _flags(architecture: Architecture, tensors: frozenset[str], values: Mapping[str, Any]) -> dict[str, bool]:
    """The fields of config.json that switch biases on, by whether the checkpoint has them."""
    flags = {}
    for field, biased in architecture.biases.items():
        module = architecture.layer.get(biased[0])
        flags[field] = f"{architecture.layers}.0.{module}.bias" in tensors
    return flags


def _layout(
    directory: Path,
    name: str,
    metadata: Mapping[str, Any],
    config: ModelConfig,
    tensors: frozenset[str],
) -> tuple[Architecture, ModelSizes]:
    """How the file's tensors correspond to the checkpoint's, as its reader finds it out."""
    there = set()
    if not config.parallel_residual:
        there.add("blk.0.ffn_norm.weight")
    if config.qk_norm:
        there.add("blk.0.attn_q_norm.weight")
    if name == "chatglm":
        there.add("blk.0.attn_qkv.weight")
    known = GgufFile(directory, dict(metadata), {each: _stand_in(each) for each in there})
    return find_architecture(known), model_sizes(ModelKeys(known, name), config.vocab_size)


def _stand_in(name: str, values: npt.NDArray[np.float32] | None = None) -> GgufTensor:
    from gguf.constants import GGMLQuantizationType

    values = np.ones(1, np.float32) if values is None else values
    return GgufTensor(name, GGMLQuantizationType.F32, values.shape, values.view(np.uint8).reshape(1, -1))


def _require_same(
    directory: Path,
    name: str,
    metadata: Mapping[str, Any],
    config: ModelConfig,
    plans: list[Plan],
    divisors: Divisors,
) -> None:
    """Raises ConfigError unless what is read back computes the same."""
    names = [each.name for plan in plans for each in plan.wanted]
    tensors = {each: _stand_in(each, divisors.get(each)) for each in (*names, *divisors)}
    file = GgufFile(directory, dict(metadata), tensors)
    keys, architecture = ModelKeys(file, name), find_architecture(file)
    values = model_config(keys, architecture, model_sizes(keys, config.vocab_size))
    read = parse_model_config(values, {}, source=str(directory))
    different = [
        field.name
        for field in dataclasses.fields(ModelConfig)
        if field.name not in _NOT_COMPARED
        and not _close(getattr(read, field.name), getattr(config, field.name))
    ]
    if different:
        raise ConfigError(
            f"{directory}: GGUF's {name} has no place for this model's {', '.join(different)}; the file "
            "would be another model"
        )


def _close(one: Any, other: Any) -> bool:
    """Whether values are the same, numbers as float32 has them."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    if dataclasses.is_dataclass(one) and type(one) is type(other):
        return all(
            _close(getattr(one, each.name), getattr(other, each.name)) for each in dataclasses.fields(one)
        )
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_close, one, other))
    return bool(one == other)
