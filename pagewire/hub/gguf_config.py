"""config.json and generation_config.json from the metadata of a GGUF file."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from pagewire.base.errors import ConfigError
from pagewire.hub.gguf_reader import GgufFile

# Of the keys below "llama."; the engine takes no larger model either.
LARGEST = {
    "embedding_length": 2**20,
    "feed_forward_length": 2**22,
    "block_count": 1024,
    "attention.head_count": 2**16,
    "attention.head_count_kv": 2**16,
    "attention.key_length": 2**14,
    "context_length": 2**27,
}
_FLOAT32 = np.finfo(np.float32)
_LLAMA3_LOW_FREQ_FACTOR = 1.0
_LLAMA3_HIGH_FREQ_FACTOR = 4.0
_LLAMA3_ORIGINAL_LENGTH = 8192


def require_supported_architecture(gguf: GgufFile) -> None:
    """Raises ConfigError unless the model is a dense Llama."""
    architecture = gguf.require("general.architecture", str)
    if architecture != "llama":
        raise ConfigError(
            f"{gguf.path}: GGUF files of the architecture '{architecture}' cannot be converted, only "
            "'llama'; use the model's Hugging Face directory instead"
        )
    if gguf.optional("llama.expert_count", int, 0) > 0:
        raise ConfigError(
            f"{gguf.path}: a mixture of experts; only dense GGUF models can be converted; "
            "use the model's Hugging Face directory instead"
        )


def model_config(gguf: GgufFile, vocab_size: int) -> dict[str, Any]:
    """The fields of config.json for LlamaForCausalLM. The weights are stored as float32.

    Raises:
        ConfigError: a needed key is missing or the file asks for something Llama does not have.
    """
    hidden_size = _count(gguf, "embedding_length")
    heads = _count(gguf, "attention.head_count")
    kv_heads = _count(gguf, "attention.head_count_kv", heads)
    head_dim = _count(gguf, "attention.key_length", hidden_size // heads)
    if heads % kv_heads or head_dim % 2:
        raise ConfigError(
            f"{gguf.path}: {heads} heads of {head_dim} values share {kv_heads} key-value heads; these must "
            "divide the heads, and a head's size must be even"
        )
    rope_dims = gguf.optional("llama.rope.dimension_count", int, head_dim)
    if rope_dims != head_dim:
        raise ConfigError(
            f"{gguf.path}: rotates {rope_dims} of {head_dim} dimensions of a head; Llama rotates all"
        )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": _count(gguf, "feed_forward_length"),
        "num_hidden_layers": _count(gguf, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": _count(gguf, "context_length"),
        "rms_norm_eps": _shortest(_number(gguf, "attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(_number(gguf, "rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "vocab_size": vocab_size,
        "torch_dtype": "float32",
        **_token_ids(gguf, vocab_size),
    }
    config["rope_scaling"] = _rope_scaling(gguf, config["head_dim"], config["rope_theta"])
    return config


def generation_config(gguf: GgufFile, vocab_size: int) -> dict[str, Any]:
    """The fields of generation_config.json: which ids begin, pad and end a text. All eos ids end it."""
    ids = _token_ids(gguf, vocab_size)
    eos = [ids["eos_token_id"]] if "eos_token_id" in ids else []
    for name in ("eot", "eom"):  # end of turn, end of message
        extra = _token_id(gguf, name, vocab_size)
        if extra is not None and extra not in eos:
            eos.append(extra)
    if eos:
        ids["eos_token_id"] = eos[0] if len(eos) == 1 else eos
    return ids


def _token_ids(gguf: GgufFile, vocab_size: int) -> dict[str, Any]:
    ids: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = _token_id(gguf, key, vocab_size)
        if value is not None:
            ids[f"{name}_token_id"] = value
    return ids


def _token_id(gguf: GgufFile, key: str, vocab_size: int) -> int | None:
    value: int | None = gguf.optional(f"tokenizer.ggml.{key}_token_id", int, None)
    if value is not None and not 0 <= value < vocab_size:
        raise ConfigError(
            f"{gguf.path}: {key}_token_id is {value} and the vocabulary ends at {vocab_size - 1}"
        )
    return value


def _count(gguf: GgufFile, name: str, default: int | None = None) -> int:
    """A size that config.json will have; what is not positive or beyond any model is refused here, where the
    file can be named."""
    key = f"llama.{name}"
    value: int = gguf.require(key, int) if default is None else gguf.optional(key, int, default)
    if not 0 < value <= LARGEST[name]:
        raise ConfigError(f"{gguf.path}: {key} is {value}; it must be between 1 and {LARGEST[name]}")
    return value


def _number(gguf: GgufFile, name: str, default: float | None = None) -> float:
    key = f"llama.{name}"
    value: float = gguf.require(key, float) if default is None else gguf.optional(key, float, default)
    if not _FLOAT32.tiny <= value <= _FLOAT32.max:
        raise ConfigError(f"{gguf.path}: {key} is {value}; it must be a positive and finite float32")
    return value


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 9.999999747378752e-06 is meant as 1e-05."""
    return float(str(np.float32(value)))


def _rope_scaling(gguf: GgufFile, head_dim: int, theta: float) -> dict[str, Any] | None:
    """Only what the engine computes too: a file is not converted for nothing."""
    kind = gguf.optional("llama.rope.scaling.type", str, "none")
    if kind not in ("none", "linear"):
        raise ConfigError(
            f"{gguf.path}: RoPE scaling '{kind}' is not implemented; 'linear' and Llama 3's can be converted"
        )
    if "rope_freqs.weight" in gguf.tensors:
        return _llama3_scaling(gguf, head_dim, theta)
    if kind == "none":
        return None
    return {"rope_type": kind, "factor": _number(gguf, "rope.scaling.factor")}


def _llama3_scaling(gguf: GgufFile, head_dim: int, theta: float) -> dict[str, Any]:
    """Llama 3.1's RoPE scaling, which GGUF stores only as the divisor of each frequency.

    The factor is the largest divisor. The other three constants are the same in every Llama 3 release;
    that they give exactly the divisors stored here is checked, not assumed.
    """
    tensor = gguf.tensors["rope_freqs.weight"]
    if tensor.type != GGMLQuantizationType.F32 or tensor.shape != (head_dim // 2,):
        raise ConfigError(
            f"{gguf.path}: rope_freqs.weight is {tensor.type.name} of the shape {tensor.shape}; it must be "
            f"F32 of ({head_dim // 2},)"
        )
    stored = tensor.data.reshape(-1).view(np.float32)
    factor = round(float(stored.max()), 4)
    if not 0 < factor < math.inf:
        raise ConfigError(
            f"{gguf.path}: rope_freqs.weight has {factor}; its values must be positive and finite"
        )
    frequency = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = _LLAMA3_ORIGINAL_LENGTH * frequency / (2 * math.pi)
    smooth = np.clip(
        (turns - _LLAMA3_LOW_FREQ_FACTOR) / (_LLAMA3_HIGH_FREQ_FACTOR - _LLAMA3_LOW_FREQ_FACTOR), 0.0, 1.0
    )
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if not np.allclose(stored, expected, rtol=1e-3):
        raise ConfigError(
            f"{gguf.path}: its rope_freqs.weight is not Llama 3's RoPE scaling; it cannot be converted"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW_FREQ_FACTOR,
        "high_freq_factor": _LLAMA3_HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL_LENGTH,
    }
