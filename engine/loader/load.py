"""From a model's name to a model ready to run."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

import torch

from engine.layers.parallel import SplitError
from engine.layers.weights import LoadableModule
from engine.loader.backbone import drop_missing_head, names_in
from engine.loader.checkpoint import Checkpoint, open_checkpoint
from engine.loader.dummy import load_dummy
from engine.loader.formats import MatrixFormats
from engine.loader.kv_scales import load_kv_scales
from engine.loader.quantized import names_of_quantized, with_quantized_layers
from engine.loader.tied import untie_own_head
from engine.loader.weights import load_weights
from engine.models.base import CausalLM, ModelContext
from engine.models.decoder import Decoder
from engine.platform.device import available_memory, fitting
from pagewire.base.errors import ConfigError

GIB = 1024**3
# Features that weights keep together: groups of most quantized checkpoints, and blocks of GGML's formats.
_GROUP, _SUPER_BLOCK, _SMALL_BLOCK = 128, 256, 32
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
        ConfigError: the checkpoint does not fit the model, or the model the memory.
    """
    started = time.monotonic()
    source = directory / "config.json"
    with fitting(device, f"{source}: the model"):
        if device.type == "cpu":
            _require_table_room(context, source)
        checkpoint = None if load_format == "dummy" else open_checkpoint(directory)
        if checkpoint is not None:
            context = drop_missing_head(untie_own_head(context, checkpoint, dtype), checkpoint)
            formats = MatrixFormats(checkpoint, names_in(checkpoint, context.config), context.config)
            experts = {name: each.for_checkpoint(formats) for name, each in context.expert_methods.items()}
            linear = context.linear_methods.for_checkpoint(formats)
            context = replace(context, linear_methods=linear, expert_methods=experts)
        context = with_quantized_layers(_with_blocks(context, checkpoint), checkpoint)
        try:
            model = create_model(context, device, dtype)
        except SplitError as error:
            raise ConfigError(f"{source}: {error}") from error
        if device.type == "cpu":
            _require_room(model, source)
        if checkpoint is None:
            load_dummy(model, seed)
        else:
            names = names_in(checkpoint, context.config)
            model.names = names_of_quantized(names, checkpoint, context.config)
            load_weights(model, checkpoint, device)
            load_kv_scales(model, checkpoint)
        for module in model.modules():
            if isinstance(module, LoadableModule):
                module.finish_loading()
    logger.info("loaded %s in %.1f s", directory, time.monotonic() - started)
    return model.eval()


def _with_blocks(context: ModelContext, checkpoint: Checkpoint | None) -> ModelContext:
    """The context in which ranks share features by whole blocks of the weights, where they can."""
    block = 1 if context.config.quantization is None else _GROUP
    if checkpoint is not None:
        kinds = {stored.blocks for tensors in checkpoint.files.values() for stored in tensors}
        if any("_K" in kind or kind.startswith("IQ") for kind in kinds):
            block = _SUPER_BLOCK
        elif any(kinds):
            block = max(block, _SMALL_BLOCK)
    return replace(context, parallel=replace(context.parallel, block=block))


def _require_table_room(context: ModelContext, source: Path) -> None:
    """The tables of rotations are the one part of a model that has its size from config.json alone, and they
    are written before any weight is looked at."""
    channels = sum(rotary.rotary_dim for rotary in context.config.rotaries)
    angle_bytes = context.max_model_len * channels * torch.float32.itemsize
    needed, available = 3 * angle_bytes, available_memory()  # they, and what they are computed from
    if needed > available // 2:
        raise ConfigError(
            f"{source}: {context.max_model_len} positions take {needed / GIB:.1f} GiB for their rotations "
            f"alone, and {available / GIB:.1f} GiB of memory are free; set max_model_len to what is needed"
        )


def _require_room(model: CausalLM, source: Path) -> None:
    """The parameters are allocated, but the system finds the memory for them as they are filled; what it
    does when there is not enough is to kill a process."""
    # What is quantized as it is loaded is on no device before, and takes a byte a weight at most.
    needed = sum(
        parameter.numel() * (1 if parameter.is_meta else parameter.itemsize)
        for parameter in model.parameters()
    )
    available = available_memory()
    if needed > available:
        raise ConfigError(
            f"{source}: the model's weights take {needed / GIB:.1f} GiB, and {available / GIB:.1f} GiB of "
            "memory are free"
        )


def create_model(context: ModelContext, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """Builds the model on the device, its parameters unfilled."""
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Decoder(context)
    finally:
        torch.set_default_dtype(default_dtype)
