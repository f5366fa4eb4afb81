"""From a model's name to a model ready to run."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch

from engine.layers.weights import LoadableModule
from engine.loader.dummy import load_dummy
from engine.loader.safetensors import load_safetensors
from engine.models.base import CausalLM, ModelContext
from engine.models.registry import model_class
from pagewire.errors import ConfigError
from pagewire.hub import resolve_model

logger = logging.getLogger(__name__)


def model_directory(model: str, load_format: str) -> Path:
    """The directory, in Hugging Face layout, that holds the model; fetched or converted first if need be.

    Raises:
        ConfigError: the load format does not fit the model, or the model is not to be had.
    """
    path = Path(model)
    if load_format == "gguf" and path.is_dir():
        raise ConfigError(
            f"load_format is 'gguf', which needs a .gguf file or an alias; {model} is a directory"
        )
    if load_format == "safetensors" and path.is_file():
        raise ConfigError(f"load_format is 'safetensors', which needs a directory; {model} is a file")
    return path if path.is_dir() else resolve_model(model)


def load_model(
    context: ModelContext,
    directory: Path,
    load_format: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> CausalLM:
    """Builds the model on the device and fills its weights.

    Args:
        load_format: "dummy" fills it with random numbers from `seed`; any other reads `directory`.

    Raises:
        ConfigError: the checkpoint does not fit the model.
    """
    started = time.monotonic()
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = model_class(context.config.architecture)(context)
    finally:
        torch.set_default_dtype(default_dtype)
    if load_format == "dummy":
        load_dummy(model, seed)
    else:
        load_safetensors(model, directory)
    for module in model.modules():
        if isinstance(module, LoadableModule):
            module.finish_loading()
    logger.info("loaded %s in %.1f s", directory, time.monotonic() - started)
    return model.eval()
