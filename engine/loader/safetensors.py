"""Weights of a directory in Hugging Face layout: one safetensors file, or shards under an index."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from engine.loader.targets import LoadTargets
from engine.models.base import CausalLM
from pagewire.errors import ConfigError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def load_safetensors(model: CausalLM, directory: Path) -> None:
    """Streams every tensor of the checkpoint, mapped from its file, into the model's parameters.

    Raises:
        ConfigError: a file is missing or damaged, or a tensor is missing, unexpected or misshaped.
    """
    targets = LoadTargets(model)
    for path in checkpoint_files(directory):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    targets.load(name, file.get_tensor(name), str(path))
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} cannot be read as safetensors: {error}") from error
    targets.require_complete(str(directory))


def checkpoint_files(directory: Path) -> list[Path]:
    """The checkpoint's files, each once.

    Raises:
        ConfigError: there is no checkpoint, the index is malformed, or a file it names is not there.
    """
    index = directory / INDEX_FILE
    if index.is_file():
        files = sorted({directory / name for name in _indexed_files(index)})
    elif (directory / SINGLE_FILE).is_file():
        files = [directory / SINGLE_FILE]
    else:
        raise ConfigError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ConfigError(f"{index} names files that are not there: {', '.join(missing)}")
    return files


def _indexed_files(index: Path) -> list[str]:
    try:
        names = list(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} is not a checkpoint index: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ConfigError(f"{index} names {name!r}; it must name files in its own directory")
    return names
