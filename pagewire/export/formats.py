"""What config.json says of the quantized weights that an export writes, in the words of other programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pagewire.export.config import ExportConfig


def quantization_config(
    config: ExportConfig, group_size: int, plain: Sequence[str], other_parts: Sequence[str]
) -> dict[str, Any]:
    """`quantization_config`.

    Args:
        group_size: of AWQ and GPTQ, -1 for all inputs.
        plain: modules of the decoder that are not quantized, by their names.
        other_parts: how the names of modules that are not the decoder's begin.
    """
    method = config.quant_method
    assert method is not None
    if method == "awq":
        return {
            "quant_method": "awq",
            "bits": config.bits,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": [*plain, *(part.rstrip(".") for part in other_parts)],
        }
    if method == "gptq":
        return {
            "quant_method": "gptq",
            "bits": config.bits,
            "group_size": group_size,
            "sym": True,
            "desc_act": False,
            "static_groups": True,
            "true_sequential": False,
            "damp_percent": 0.01,
            "lm_head": False,
            "checkpoint_format": "gptq",
            **_dynamic(plain),
        }
    kind = "float" if method == "fp8" else "int"
    weights = _eight_bits(kind, "channel", dynamic=False)
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if method == "fp8" else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": _eight_bits(kind, "token", dynamic=True),
                "output_activations": None,
            }
        },
        "ignore": [*plain, *(f"re:{part}.*" for part in other_parts)],
        "kv_cache_scheme": None,
    }


def _dynamic(plain: Sequence[str]) -> dict[str, Any]:
    """GPTQModel's way to name modules that are left as they are; the output projection has its own field."""
    names = [name for name in plain if not name.endswith("lm_head")]
    escaped = (name.replace(".", "\\.") for name in names)
    return {"dynamic": {f"-:^{name}$": {} for name in escaped}} if names else {}


def _eight_bits(kind: str, strategy: str, *, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": kind,
        "symmetric": True,
        "strategy": strategy,
        "dynamic": dynamic,
        "group_size": None,
        "block_structure": None,
        "actorder": None,
    }
