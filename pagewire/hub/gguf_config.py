"""config.json and generation_config.json from the metadata of a GGUF file."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pagewire.errors import ConfigError
from pagewire.hub.gguf_reader import GgufFile

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
    hidden_size = gguf.require("llama.embedding_length", int)
    heads = gguf.require("llama.attention.head_count", int)
    if heads <= 0 or hidden_size <= 0:
        raise ConfigError(
            f"{gguf.path}: head_count {heads} and embedding_length {hidden_size} must be positive"
        )
    head_dim = gguf.optional("llama.attention.key_length", int, hidden_size // heads)
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
        "intermediate_size": gguf.require("llama.feed_forward_length", int),
        "num_hidden_layers": gguf.require("llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": gguf.optional("llama.attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "max_position_embeddings": gguf.require("llama.context_length", int),
        "rms_norm_eps": _shortest(gguf.require("llama.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _shortest(gguf.optional("llama.rope.freq_base", float, 10000.0)),
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
        extra = gguf.optional(f"tokenizer.ggml.{name}_token_id", int, None)
        if extra is not None and extra not in eos:
            eos.append(extra)
    if eos:
        ids["eos_token_id"] = eos[0] if len(eos) == 1 else eos
    return ids


def _token_ids(gguf: GgufFile, vocab_size: int) -> dict[str, Any]:
    ids: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = gguf.optional(f"tokenizer.ggml.{key}_token_id", int, None)
        if value is None:
            continue
        if not 0 <= value < vocab_size:
            raise ConfigError(
                f"{gguf.path}: {key}_token_id is {value} and the vocabulary ends at {vocab_size - 1}"
            )
        ids[f"{name}_token_id"] = value
    return ids


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 9.999999747378752e-06 is meant as 1e-05."""
    return float(str(np.float32(value)))


def _rope_scaling(gguf: GgufFile, head_dim: int, theta: float) -> dict[str, Any] | None:
    if "rope_freqs.weight" in gguf.tensors:
        return _llama3_scaling(gguf, head_dim, theta)
    kind = gguf.optional("llama.rope.scaling.type", str, "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": gguf.require("llama.rope.scaling.factor", float)}
    if kind == "yarn":
        original = "original_context_length"
        scaling["original_max_position_embeddings"] = gguf.require(f"llama.rope.scaling.{original}", int)
    elif kind != "linear":
        raise ConfigError(
            f"{gguf.path}: RoPE scaling '{kind}'; 'linear', 'yarn' and Llama 3's can be converted"
        )
    return scaling


def _llama3_scaling(gguf: GgufFile, head_dim: int, theta: float) -> dict[str, Any]:
    """Llama 3.1's RoPE scaling, which GGUF stores only as the divisor of each frequency.

    The factor is the largest divisor. The other three constants are the same in every Llama 3 release;
    that they give exactly the divisors stored here is checked, not assumed.
    """
    stored = gguf.tensors["rope_freqs.weight"].data.reshape(-1).view(np.float32)
    factor = round(float(stored.max()), 4)
    frequency = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = _LLAMA3_ORIGINAL_LENGTH * frequency / (2 * math.pi)
    smooth = np.clip(
        (turns - _LLAMA3_LOW_FREQ_FACTOR) / (_LLAMA3_HIGH_FREQ_FACTOR - _LLAMA3_LOW_FREQ_FACTOR), 0.0, 1.0
    )
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-3):
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
