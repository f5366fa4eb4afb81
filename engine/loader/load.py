"""From a model's name to a model ready to run."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch

from engine.device import fitting
from engine.layers.weights import LoadableModule
from engine.loader.dummy import load_dummy
from engine.loader.safetensors import load_safetensors
from engine.models.base import CausalLM, ModelContext
from engine.models.registry import model_class

logger = logging.getLogger(__name__)


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
    with fitting(device, "the model"):
        model = create_model(context, device, dtype)
        if load_format == "dummy":
            load_dummy(model, seed)
        else:
            load_safetensors(model, directory, device)
        for module in model.modules():
            if isinstance(module, LoadableModule):
                module.finish_loading()
    logger.info("loaded %s in %.1f s", directory, time.monotonic() - started)
    return model.eval()


def create_model(context: ModelContext, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """Builds the model on the device, its parameters unfilled."""
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return model_class(context.config.architecture)(context)
    finally:
        torch.set_default_dtype(default_dtype)
