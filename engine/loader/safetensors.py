"""From safetensors files to a model's parameters: through mapped memory on a CPU, streamed to a GPU."""

from __future__ import annotations

import logging
import time
from contextlib import closing

import torch
from safetensors import safe_open

from engine.loader.checkpoint import Checkpoint, readable
from engine.loader.stream import stream_tensors
from engine.loader.targets import LoadTargets
from engine.models.base import CausalLM

logger = logging.getLogger(__name__)


def load_safetensors(model: CausalLM, checkpoint: Checkpoint, device: torch.device) -> None:
    """Puts every tensor of the checkpoint into the model's parameters, which are on the device.

    Raises:
        ConfigError: a file is damaged, or a tensor is missing, unexpected or misshaped.
    """
    targets = LoadTargets(model)
    if device.type == "cpu":
        _load_mapped(targets, checkpoint)
    else:
        _load_streamed(targets, checkpoint, device)
    targets.require_complete(str(checkpoint.directory))


def _load_mapped(targets: LoadTargets, checkpoint: Checkpoint) -> None:
    """Copies each tensor from its file's pages in memory."""
    for path, tensors in checkpoint.files.items():
        with readable(path), safe_open(path, framework="pt", device="cpu") as file:
            for stored in tensors:
                if targets.wants(stored.name, str(path)):
                    targets.load(stored.name, file.get_tensor(stored.name), str(path))


def _load_streamed(targets: LoadTargets, checkpoint: Checkpoint, device: torch.device) -> None:
    """Copies each tensor from the device's memory, where it comes by way of a few buffers."""
    started = time.monotonic()
    num_bytes = 0
    for path, tensors in checkpoint.files.items():
        wanted = [stored for stored in tensors if targets.wants(stored.name, str(path))]
        with readable(path), closing(stream_tensors(wanted, device)) as arriving:
            for stored, tensor in arriving:
                targets.load(stored.name, tensor, str(path))
                num_bytes += stored.num_bytes
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = max(time.monotonic() - started, 1e-9)
    logger.info("read %.2f GB in %.2f s: %.1f GB/s", num_bytes / 1e9, seconds, num_bytes / 1e9 / seconds)
