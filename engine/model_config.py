"""What a checkpoint's config.json says, read once into one frozen object.

Every family of models is described by the same fields, so that the rest of the engine reads no JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.models.registry import require_supported
from pagewire.errors import ConfigError
from pagewire.model_files import read_json_object

# Far beyond any model, and small enough that no product of them overflows and that a model of this many
# layers is built in seconds: what the file asks for is compared with the memory there is after that.
LARGEST = {
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 1024,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**14,
    "vocab_size": 2**22,
    "max_position_embeddings": 2**27,
    "original_max_position_embeddings": 2**31,
}
MAX_EOS_TOKEN_IDS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the model was first trained on.

    Attributes:
        kind: "linear" divides every frequency by `factor`; "llama3" does so for long wavelengths only and
            blends between them and the short ones (Llama 3.1 model card).
        factor: the stretch.
        low_freq_factor, high_freq_factor, original_max_position: bounds of the blend, "llama3" only:
            wavelengths above original/low are stretched in full, below original/high not at all.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder-only model.

    Attributes:
        architecture: the class name in config.json's `architectures`.
        head_dim: size of one attention head; not always hidden_size / num_attention_heads.
        max_position_embeddings: the longest context the model was made for.
        rope_theta, rope_scaling: the rotary embedding.
        qkv_bias, o_bias, mlp_bias: which projections have a bias.
        qk_norm: whether every query and key head is normalised before rotation.
        tie_word_embeddings: whether the output projection is the embedding matrix.
        eos_token_ids: every token that ends a completion.
        dtype: the number format the checkpoint was saved in, such as "bfloat16"; "" if it does not say.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    dtype: str


def load_model_config(directory: Path) -> ModelConfig:
    """Reads config.json and, where there is one, generation_config.json.

    Raises:
        ConfigError: a file is missing or malformed, the architecture is unknown, or the model uses a
            feature that is not implemented. Nothing the model needs is ignored.
    """
    path = directory / "config.json"
    values = read_json_object(path)
    generation_path = directory / "generation_config.json"
    generation = read_json_object(generation_path) if generation_path.is_file() else {}
    return parse_model_config(values, generation, source=str(path), generation_source=str(generation_path))


def parse_model_config(
    values: Mapping[str, Any],
    generation: Mapping[str, Any],
    *,
    source: str,
    generation_source: str = "generation_config.json",
) -> ModelConfig:
    """The configuration in parsed JSON; the sources name it in errors. Raises as load_model_config."""
    fields = _Fields(values, source)
    architecture = _architecture(values, source)
    _refuse_unsupported(fields)
    hidden_size = fields.positive("hidden_size")
    num_heads = fields.positive("num_attention_heads")
    num_kv_heads = fields.positive("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        fields.fail("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads ({num_heads})")
    if values.get("head_dim") is None and hidden_size % num_heads:
        fields.fail("hidden_size", hidden_size, f"a multiple of num_attention_heads ({num_heads})")
    head_dim = fields.positive("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        fields.fail("head_dim", head_dim, "even, for the rotary embedding")
    rope_theta, rope_scaling = _rope(fields)
    vocab_size = fields.positive("vocab_size")
    attention_bias = fields.flag("attention_bias")
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.positive("intermediate_size"),
        num_hidden_layers=fields.positive("num_hidden_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=fields.positive("max_position_embeddings", 2048),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias"),
        qk_norm=architecture == "Qwen3ForCausalLM",
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        eos_token_ids=_eos_token_ids({generation_source: generation, source: values}, vocab_size),
        dtype=str(values.get("dtype") or values.get("torch_dtype") or ""),
    )


@dataclass(frozen=True, slots=True)
class _Fields:
    """Typed access to a JSON object, with errors that name the file and the field."""

    values: Mapping[str, Any]
    source: str

    def fail(self, name: str, value: object, allowed: str) -> None:
        raise ConfigError(f"{self.source}: {name} is {value!r}; it must be {allowed}")

    def positive(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.fail(name, value, "a positive integer")
        if value > LARGEST[name]:  # type: ignore[operator]
            self.fail(name, value, f"at most {LARGEST[name]}")
        return int(value)  # type: ignore[arg-type]

    def number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name)
        if value is None:
            value = default
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value <= sys.float_info.max:  # type: ignore[operator]
            self.fail(name, value, "a positive number")
        return float(value)  # type: ignore[arg-type]

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            self.fail(name, value, "true or false")
        return bool(value)


def _architecture(values: Mapping[str, Any], source: str) -> str:
    architectures = values.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ConfigError(f"{source}: architectures is {architectures!r}; it must be a list of one name")
    architecture = str(architectures[0])
    require_supported(architecture, source)
    return architecture


def _refuse_unsupported(fields: _Fields) -> None:
    """Refuses what would change the model's output if it were ignored."""
    values = fields.values
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        fields.fail("hidden_act", activation, "'silu'; no other activation is implemented")
    # Some checkpoints carry a window that use_sliding_window switches off.
    if values.get("sliding_window") is not None and values.get("use_sliding_window", True):
        fields.fail(
            "sliding_window", values["sliding_window"], "null; sliding-window attention is not implemented"
        )
    quantization = values.get("quantization_config")
    if quantization is not None:
        if not isinstance(quantization, dict):
            fields.fail("quantization_config", quantization, "an object or null")
        method = quantization.get("quant_method", "unknown")
        raise ConfigError(f"{fields.source}: the weights are quantized ({method}); that is not implemented")


def _rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """The base and the scaling, from `rope_parameters` (newer) or `rope_theta` + `rope_scaling`."""
    parameters = fields.values.get("rope_parameters") or fields.values.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        fields.fail("rope_scaling", parameters, "an object or null")
    rope = _Fields(parameters, f"{fields.source}: rope parameters")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        rope.fail("partial_rotary_factor", parameters["partial_rotary_factor"], "1")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind=kind, factor=rope.number("factor"))
    if kind == "llama3":
        scaling = RopeScaling(
            kind=kind,
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_position=rope.positive("original_max_position_embeddings"),
        )
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            rope.fail("low_freq_factor", scaling.low_freq_factor, "less than high_freq_factor")
        return theta, scaling
    rope.fail("rope_type", kind, "'default', 'linear' or 'llama3'; no other scaling is implemented")
    raise AssertionError("unreachable")


def _eos_token_ids(files: Mapping[str, Mapping[str, Any]], vocab_size: int) -> tuple[int, ...]:
    """Every end-of-sequence id that any of the files names; each may give one id, a list or null."""
    token_ids: dict[int, None] = {}
    for source, values in files.items():
        entry = values.get("eos_token_id")
        for token_id in entry if isinstance(entry, list) else [entry]:
            if token_id is None:
                continue
            is_integer = isinstance(token_id, int) and not isinstance(token_id, bool)
            if not is_integer or not 0 <= token_id < vocab_size:
                raise ConfigError(f"{source}: eos_token_id {token_id!r} is not a token id below {vocab_size}")
            token_ids[token_id] = None
        if len(token_ids) > MAX_EOS_TOKEN_IDS:
            raise ConfigError(f"{source}: eos_token_id names more than {MAX_EOS_TOKEN_IDS} tokens")
    return tuple(token_ids)
