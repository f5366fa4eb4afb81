"""From a checkpoint's files to a model's parameters: through mapped memory on a CPU, streamed to a GPU."""

from __future__ import annotations

import logging
import mmap
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

from engine.loader.checkpoint import Checkpoint, is_safetensors, readable
from engine.loader.stream import StoredTensor, stream_tensors
from engine.loader.targets import LoadTargets
from engine.models.base import CausalLM

# Linux's; Python names it from 3.13 on.
_MAP_NORESERVE = 0x4000

logger = logging.getLogger(__name__)


def load_weights(model: CausalLM, checkpoint: Checkpoint, device: torch.device) -> None:
    """Puts every tensor of the checkpoint into the model's parameters, which are on the device.

    Raises:
        ConfigError: a file is damaged, or tensors are missing, unexpected or misshaped: all of those are
            known from the files' headers and named in one message, before any number is read.
    """
    targets = LoadTargets(model)
    targets.require_fit(str(checkpoint.directory), checkpoint.files)
    if device.type == "cpu":
        _load_mapped(targets, checkpoint)
    else:
        _load_streamed(targets, checkpoint, device)


def _load_mapped(targets: LoadTargets, checkpoint: Checkpoint) -> None:
    """Copies each tensor from its file's pages in memory."""
    for path, tensors in checkpoint.files.items():
        with readable(path), mapped(path) as tensor_of:
            for stored in tensors:
                if targets.wants(stored.name, str(path)):
                    targets.load(stored, tensor_of(stored), str(path))


@contextmanager
def mapped(path: Path) -> Iterator[Callable[[StoredTensor], torch.Tensor]]:
    """A file whose tensors are views of its pages, which the system reads as they are copied and forgets. To
    be used inside `readable`."""
    if is_safetensors(path):
        with safe_open(path, framework="pt", device="cpu") as file:
            yield lambda stored: file.get_tensor(stored.name)
        return
    with path.open("rb") as file:
        # Torch wants memory that may be written. None is, so the system need not have room for copies.
        flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
        pages = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    yield lambda stored: _view(pages, stored)


def _view(pages: mmap.mmap, stored: StoredTensor) -> torch.Tensor:
    if stored.num_bytes == 0:
        return torch.empty(stored.shape, dtype=stored.dtype)
    count = stored.num_bytes // stored.dtype.itemsize
    elements = torch.frombuffer(pages, dtype=stored.dtype, count=count, offset=stored.begin)
    return stored.view(elements)


def _load_streamed(targets: LoadTargets, checkpoint: Checkpoint, device: torch.device) -> None:
    """Copies each tensor from the device's memory, where it comes by way of a few buffers."""
    started = time.monotonic()
    num_bytes = 0
    for path, tensors in checkpoint.files.items():
        wanted = [stored for stored in tensors if targets.wants(stored.name, str(path))]
        with readable(path), closing(stream_tensors(wanted, device)) as arriving:
            for stored, tensor in arriving:
                targets.load(stored, tensor, str(path))
                num_bytes += stored.num_bytes
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = max(time.monotonic() - started, 1e-9)
    logger.info("read %.2f GB in %.2f s: %.1f GB/s", num_bytes / 1e9, seconds, num_bytes / 1e9 / seconds)
