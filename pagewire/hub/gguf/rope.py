"""config.json's `rope_scaling` from the keys and tensors of a GGUF file."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from pagewire.hub.gguf.keys import ModelKeys, ModelSizes, shortest

# Tensors that become rope_scaling. They are no weights.
LLAMA3_DIVISORS = "rope_freqs.weight"
LONG_DIVISORS, SHORT_DIVISORS = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = frozenset((LLAMA3_DIVISORS, LONG_DIVISORS, SHORT_DIVISORS))

_LLAMA3_LOW_FREQ_FACTOR = 1.0
_LLAMA3_HIGH_FREQ_FACTOR = 4.0
_LLAMA3_ORIGINAL_LENGTH = 8192


def rope_scaling(keys: ModelKeys, sizes: ModelSizes, theta: float) -> dict[str, Any] | None:
    """How rotary frequencies are scaled, None for not at all.

    Raises:
        ConfigError: the file asks for a scaling that config.json cannot express or the engine does not have.
    """
    # The first converters had a key for the only scaling that there was.
    legacy = "rope.scale_linear" in keys and keys.number("rope.scale_linear") != 1.0
    kind = keys.text("rope.scaling.type", "linear" if legacy else "none")
    tensors = keys.gguf.tensors
    if kind in ("none", "longrope") and (LONG_DIVISORS in tensors or SHORT_DIVISORS in tensors):
        return _longrope(keys, sizes)
    if kind == "longrope":
        raise keys.error(
            f"RoPE scaling 'longrope' needs {LONG_DIVISORS} and {SHORT_DIVISORS}; both are missing"
        )
    if kind not in ("none", "linear", "yarn"):
        raise keys.error(
            f"RoPE scaling {kind[:40]!r} is not implemented; 'linear', 'yarn', 'longrope' and Llama 3's "
            "can be converted"
        )
    divisors = sorted(ROPE_TENSORS & tensors.keys())
    if divisors and kind != "none":
        raise keys.error(
            f"has the RoPE scaling {kind!r} and {divisors[0]} as well; only one can be converted"
        )
    if kind == "linear":
        return {
            "rope_type": kind,
            "factor": keys.number("rope.scale_linear" if legacy else "rope.scaling.factor"),
        }
    if kind == "yarn":
        return _yarn(keys, sizes)
    return _llama3(keys, sizes.rotated, theta) if divisors else None


def _yarn(keys: ModelKeys, sizes: ModelSizes) -> dict[str, Any]:
    """YaRN (arXiv:2309.00071). llama.cpp's converter copies config.json's values."""
    for name in ("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_log_multiplier"):
        if name in keys and keys.gguf.require(keys.key(name), float) not in (-1.0, 0.0, 1.0):
            raise keys.error(f"{keys.key(name)} is set, which is not implemented")
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": keys.number("rope.scaling.factor"),
        "original_max_position_embeddings": keys.count("rope.scaling.original_context_length", sizes.context),
    }
    for field, name in (
        ("attention_factor", "rope.scaling.yarn_attn_factor"),
        ("beta_fast", "rope.scaling.yarn_beta_fast"),
        ("beta_slow", "rope.scaling.yarn_beta_slow"),
    ):
        if name in keys:
            scaling[field] = keys.number(name)
    return scaling


def _longrope(keys: ModelKeys, sizes: ModelSizes) -> dict[str, Any]:
    """LongRoPE (arXiv:2402.13753): a divisor for each frequency, for contexts up to the original length and
    for longer ones."""
    original = keys.count("rope.scaling.original_context_length")
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "short_factor": _divisor_list(keys, SHORT_DIVISORS, sizes.rotated // 2),
        "long_factor": _divisor_list(keys, LONG_DIVISORS, sizes.rotated // 2),
        "original_max_position_embeddings": original,
    }
    stretch = sizes.context / original
    usual = 1.0
    if stretch > 1 and original > 1:
        usual = math.sqrt(1 + math.log(stretch) / math.log(original))
    attention_factor = keys.number("rope.scaling.attn_factor", usual)
    if not math.isclose(attention_factor, usual, rel_tol=1e-6):
        scaling["attention_factor"] = attention_factor
    return scaling


def _divisor_list(keys: ModelKeys, name: str, count: int) -> list[float]:
    return [shortest(value) for value in _divisors(keys, name, count).tolist()]


def _divisors(keys: ModelKeys, name: str, count: int) -> npt.NDArray[np.float32]:
    """A tensor of divisors, [count], checked."""
    tensor = keys.gguf.tensors.get(name)
    if tensor is None:
        raise keys.error(f"lacks the tensor {name}; is the file complete?")
    if tensor.type != GGMLQuantizationType.F32 or tensor.shape != (count,):
        raise keys.error(
            f"{name} is {tensor.type.name} of the shape {tensor.shape}; it must be F32 of ({count},)"
        )
    values: npt.NDArray[np.float32] = np.ascontiguousarray(tensor.data).reshape(-1).view(np.float32)
    if not np.all((values > 0) & (values < math.inf)):
        raise keys.error(
            f"{name} has {values.min()} to {values.max()}; its values must be positive and finite"
        )
    return values


def _llama3(keys: ModelKeys, rotated: int, theta: float) -> dict[str, Any]:
    """Llama 3.1's RoPE scaling, which GGUF stores only as the divisor of each frequency.

    The factor is the largest divisor. The other three constants are the same in every Llama 3 release;
    that they give exactly the divisors stored here is checked, not assumed.
    """
    stored = _divisors(keys, LLAMA3_DIVISORS, rotated // 2)
    factor = round(float(stored.max()), 4)
    frequency = theta ** -(np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    turns = _LLAMA3_ORIGINAL_LENGTH * frequency / (2 * math.pi)
    smooth = np.clip(
        (turns - _LLAMA3_LOW_FREQ_FACTOR) / (_LLAMA3_HIGH_FREQ_FACTOR - _LLAMA3_LOW_FREQ_FACTOR), 0.0, 1.0
    )
    with np.errstate(divide="ignore"):  # a factor that rounds to zero is refused below
        expected = 1.0 / ((1.0 - smooth) / np.float64(factor) + smooth)
    if not np.allclose(stored, expected, rtol=1e-3):
        raise keys.error(f"its {LLAMA3_DIVISORS} is not Llama 3's RoPE scaling; it cannot be converted")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW_FREQ_FACTOR,
        "high_freq_factor": _LLAMA3_HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL_LENGTH,
    }
