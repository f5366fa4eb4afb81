"""Adapters by name: a directory as PEFT or ms-swift saves it, or a repository on a hub that holds one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pagewire.base.cache_home import cache_home
from pagewire.base.errors import ConfigError
from pagewire.hub.fetch.huggingface import HuggingFaceRepository
from pagewire.hub.fetch.modelscope import ModelScopeRepository
from pagewire.hub.fetch.repository import Repository, fetch_files_of
from pagewire.hub.model_files import MAX_CONFIG_BYTES, read_bytes, require_weight_files
from pagewire.hub.names.reference import HUGGINGFACE, ModelReference

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""The preferred one first. Of files of torch.save only tensors are read, and nothing that they say is run."""


def resolve_adapter(name: str, *, progress: bool = False) -> Path:
    """The directory of an adapter, fetched if need be.

    Args:
        name: a directory, or a repository on a hub as `ModelReference` has it.
        progress: whether to show long work on stderr.

    Raises:
        ConfigError: there is no such adapter, or it cannot be fetched.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        return adapter_directory(path.resolve())
    reference = None if path.exists() or "\0" in name else ModelReference.parse(name)
    if reference is None or reference.file is not None:
        raise ConfigError(
            f"{name!r} is no adapter: there is no such directory, and it is not owner/name on a hub",
            param="lora_path",
        )
    return adapter_directory(_fetch(reference, progress=progress))


def adapter_directory(directory: Path) -> Path:
    """The directory itself, or the only folder in it that holds an adapter: ms-swift saves adapters in
    folders of their names.

    Raises:
        ConfigError: there is no adapter, or there are several.
    """
    if (directory / CONFIG_FILE).is_file():
        return directory
    below = sorted(path.parent for path in directory.glob(f"*/{CONFIG_FILE}")) if directory.is_dir() else []
    if len(below) == 1:
        return below[0]
    if below:
        names = ", ".join(str(path) for path in below[:8])
        raise ConfigError(f"{directory} holds several adapters; name one of {names}", param="lora_path")
    raise ConfigError(f"{directory} has no {CONFIG_FILE}, so it is not an adapter", param="lora_path")


def weights_file(directory: Path) -> Path:
    """The file of an adapter's tensors.

    Raises:
        ConfigError: it is missing, not a regular file, or a link that leads elsewhere.
    """
    for name in WEIGHTS_FILES:
        if (directory / name).is_file():
            return require_weight_files(directory, [name])[0]
    raise ConfigError(f"{directory} has neither {' nor '.join(WEIGHTS_FILES)}", param="lora_path")


def adapter_digest(directory: Path) -> str:
    """What an adapter's files hold, as 64 hexadecimal digits: equal for copies, different for any other.
    Reads all of it.

    Raises:
        ConfigError: a file is missing or cannot be read.
    """
    directory = adapter_directory(directory)
    digest = hashlib.sha256(read_bytes(directory / CONFIG_FILE, MAX_CONFIG_BYTES))
    path = weights_file(directory)
    try:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _fetch(reference: ModelReference, *, progress: bool) -> Path:
    name = reference.repository
    repository: Repository
    if reference.hub == HUGGINGFACE:
        repository = HuggingFaceRepository(name, reference.revision, cache_home() / "huggingface")
    else:
        repository = ModelScopeRepository(name, reference.revision, cache_home() / "modelscope")
    return fetch_files_of(repository, _wanted, progress=progress)


def _wanted(model: str, names: list[str]) -> list[str]:
    """Of a repository's files, those of its adapter."""
    weights = [name for name in WEIGHTS_FILES if name in names]
    if CONFIG_FILE not in names or not weights:
        raise ConfigError(
            f"{model}: has no {CONFIG_FILE} with {' or '.join(WEIGHTS_FILES)}, so it is not an adapter",
            param="lora_path",
        )
    return [CONFIG_FILE, weights[0]]
