"""config.json and generation_config.json from the metadata of a GGUF file."""

from __future__ import annotations

from typing import Any

from pagewire.base.errors import ConfigError
from pagewire.hub.gguf.architectures import ALWAYS, Architecture
from pagewire.hub.gguf.keys import ModelKeys, ModelSizes
from pagewire.hub.gguf.reader import GgufFile
from pagewire.hub.gguf.rope import rope_scaling

_RMS_EPSILON, _LAYER_EPSILON = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"


def model_config(keys: ModelKeys, architecture: Architecture, sizes: ModelSizes) -> dict[str, Any]:
    """The fields of config.json. The weights are stored as float32.

    Raises:
        ConfigError: a needed key is missing or the file asks for something the family does not have.
    """
    if not architecture.partial_rotary and sizes.rotated != sizes.head_dim:
        raise keys.error(
            f"rotates {sizes.rotated} of {sizes.head_dim} dimensions of a head; {architecture.class_name} "
            "rotates all"
        )
    if not keys.flag("attention.causal", True):
        raise keys.error("its tokens see those after them; only causal models can be converted")
    tensors = keys.gguf.tensors
    has_rms = _RMS_EPSILON in keys or _LAYER_EPSILON not in keys
    theta = keys.number("rope.freq_base", 10000.0)
    fields = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": sizes.context,
        "rms_norm_eps": keys.number(_RMS_EPSILON if has_rms else _LAYER_EPSILON),
        "rope_theta": theta,
        "rope_scaling": rope_scaling(keys, sizes, theta),
        **{
            field: f"blk.0.{biased[0]}.bias" in tensors
            for field, biased in architecture.biases.items()
            if field != ALWAYS
        },
        "tie_word_embeddings": "output.weight" not in tensors,
        "vocab_size": sizes.vocab,
        "torch_dtype": "float32",
        **_token_ids(keys.gguf, sizes.vocab),
    }
    return architecture.add_fields(keys, sizes, fields)


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
