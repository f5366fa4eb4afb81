"""Weights of a directory in Hugging Face layout: one safetensors file, or shards under an index."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.loader.stream import stored_tensors, stream_tensors
from engine.loader.targets import LoadTargets
from engine.models.base import CausalLM
from pagewire.base.errors import ConfigError
from pagewire.hub.model_files import INDEX_FILE, indexed_files, pickle_hint, require_weight_files

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"


def load_safetensors(model: CausalLM, directory: Path, device: torch.device) -> None:
    """Puts every tensor of the checkpoint into the model's parameters, which are on the device.

    Raises:
        ConfigError: a file is missing or damaged, or a tensor is missing, unexpected or misshaped.
    """
    targets = LoadTargets(model)
    files = checkpoint_files(directory)
    if device.type == "cpu":
        _load_mapped(targets, files)
    else:
        _load_streamed(targets, files, device)
    targets.require_complete(str(directory))


def _load_mapped(targets: LoadTargets, files: list[Path]) -> None:
    """Copies each tensor from its file's pages in memory."""
    for path in files:
        with _readable(path):
            names = [stored.name for stored in stored_tensors(path)]
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in names:
                    if targets.wants(name, str(path)):
                        targets.load(name, file.get_tensor(name), str(path))


def _load_streamed(targets: LoadTargets, files: list[Path], device: torch.device) -> None:
    """Copies each tensor from the device's memory, where it comes by way of a few buffers."""
    started = time.monotonic()
    num_bytes = 0
    for path in files:
        with _readable(path):
            wanted = [stored for stored in stored_tensors(path) if targets.wants(stored.name, str(path))]
            with closing(stream_tensors(wanted, device)) as arriving:
                for stored, tensor in arriving:
                    targets.load(stored.name, tensor, str(path))
                    num_bytes += stored.num_bytes
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = max(time.monotonic() - started, 1e-9)
    logger.info("read %.2f GB in %.2f s: %.1f GB/s", num_bytes / 1e9, seconds, num_bytes / 1e9 / seconds)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Around reading a file: says which could not be read."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        hint = "; it is cut short, or longer than it should be" if "not fully covered" in str(error) else ""
        raise ConfigError(f"{path} cannot be read as safetensors: {error}{hint}") from error


def checkpoint_files(directory: Path) -> list[Path]:
    """The checkpoint's files, each once.

    Raises:
        ConfigError: there is no checkpoint, the index is malformed, or a file it names is not there or
            lies elsewhere.
    """
    index = directory / INDEX_FILE
    if index.is_file():
        return require_weight_files(directory, indexed_files(index), listed_in=index)
    if (directory / SINGLE_FILE).is_file():
        return require_weight_files(directory, [SINGLE_FILE])
    raise ConfigError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}{pickle_hint(directory)}")
