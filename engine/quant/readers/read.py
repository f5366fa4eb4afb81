"""What a model directory says about the quantization of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.quant.config import Quantization, SchemeRule
from engine.quant.excluded import ExcludedModules
from engine.quant.fields import QuantFields
from engine.quant.readers.compressed_tensors import read_compressed_tensors
from engine.quant.readers.floats import read_bitsandbytes, read_fp8
from engine.quant.readers.integers import read_auto_round, read_awq, read_gptq, read_squeezellm
from engine.quant.schemes import AtLoad
from pagewire.base.errors import ConfigError
from pagewire.hub.model_files import read_json_object

# For experts alone, whose families read the rest.
MXFP4 = "mxfp4"
_READERS: Mapping[str, Callable[[QuantFields], Quantization]] = {
    "awq": read_awq,
    "gptq": read_gptq,
    "auto-round": read_auto_round,
    "compressed-tensors": read_compressed_tensors,
    "fp8": read_fp8,
    "bitsandbytes": read_bitsandbytes,
    "squeezellm": read_squeezellm,
    MXFP4: lambda fields: Quantization(MXFP4, "mxfp4 experts", ()),
}
# Older files of AWQ and GPTQ beside config.json -> what they describe.
_OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_AT_LOAD = {
    "int8": "int8 made at load, a scale an output",
    "int4": "int4 made at load, in groups of 128 or 32",
    "fp8": "fp8 made at load, a scale an output, inputs by token",
}
# Formats whose tensors alone say enough, if the user says which it is.
_WITHOUT_DESCRIPTION = ("awq", "squeezellm")


def read_quantization(
    values: Mapping[str, Any], source: str, *, directory: Path | None = None, wanted: str = "auto"
) -> Quantization | None:
    """How a model's linear layers are quantized; None for not at all.

    Args:
        values: of config.json.
        source: names it in errors.
        directory: where older checkpoints have a file of their own for this.
        wanted: "auto" for what the checkpoint says; the name of a format insists on that; "int8", "int4" and
            "fp8" quantize plain weights.

    Raises:
        ConfigError: the format, or a version of it, is not supported, or is not what is wanted.
    """
    described, source = _described(values, source, directory)
    if described is None:
        return _made(wanted, source)
    method = _method(described, source)
    if method not in _READERS:
        raise ConfigError(
            f"{source}: the weights are quantized as {method!r}, which is not supported; supported are "
            f"{', '.join(_READERS)}"
        )
    if wanted not in ("auto", method):
        raise _differs(wanted, method, source)
    return _READERS[method](QuantFields(described, source, method))


def _described(
    values: Mapping[str, Any], source: str, directory: Path | None
) -> tuple[dict[str, Any] | None, str]:
    """The description, and where it stands."""
    described = values.get("quantization_config")
    if described is None:
        described = values.get("compression_config")  # its name before transformers 4.45
    if described is not None:
        if not isinstance(described, dict):
            raise ConfigError(f"{source}: quantization_config is {described!r}; it must be an object or null")
        return described, f"{source}: quantization_config"
    for name, method in _OWN_FILES.items():
        path = None if directory is None else directory / name
        if path is not None and path.is_file():
            return {"quant_method": method, **read_json_object(path)}, str(path)
    return None, source


def _method(described: Mapping[str, Any], source: str) -> str:
    method = described.get("quant_method")
    if method is None and ("load_in_4bit" in described or "load_in_8bit" in described):
        return "bitsandbytes"
    if not isinstance(method, str):
        raise ConfigError(f"{source}: quant_method is {method!r}; supported are {', '.join(_READERS)}")
    return method.lower().replace("_", "-").removeprefix("intel/")


def _made(wanted: str, source: str) -> Quantization | None:
    """Plain weights, or those of a checkpoint without a description."""
    if wanted == "auto":
        return None
    if wanted in _AT_LOAD:
        rules = (SchemeRule(AtLoad(wanted), everything=True),)
        return Quantization(wanted, _AT_LOAD[wanted], rules, ExcludedModules(["lm_head"], source))
    if wanted in _WITHOUT_DESCRIPTION:
        return _READERS[wanted](QuantFields({}, f"{source}, as quantization {wanted!r}", wanted))
    raise ConfigError(
        f"quantization is {wanted!r}, but {source} has no quantization_config; plain weights can be "
        f"quantized as they are loaded to {', '.join(_AT_LOAD)}",
        param="quantization",
    )


def _differs(wanted: str, method: str, source: str) -> ConfigError:
    return ConfigError(
        f"quantization is {wanted!r}, but {source} says {method!r}; use auto or {method}",
        param="quantization",
    )
