"""Fetches models from the Hugging Face Hub: weights as safetensors, never code or pickles."""

from __future__ import annotations

import re
from pathlib import Path

from pagewire.base.errors import ConfigError
from pagewire.hub.model_files import INDEX_FILE, check_small_files, indexed_files

_HF_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
]
_UNWANTED = ["original/*", "onnx/*", "consolidated*", "*.bin", "*.py"]


def is_huggingface_id(model: str) -> bool:
    """Whether it has the form owner/name."""
    return _HF_ID.fullmatch(model) is not None and ".." not in model


def fetch_snapshot(model: str, cache: Path, *, progress: bool) -> Path:
    """The directory of a model's snapshot, fetched as far as it is not in the cache.

    Without a network the snapshot of an earlier call is used.

    Raises:
        ConfigError: the model does not exist, may not be read, cannot be reached, or has no safetensors.
    """
    # Imported here because it is slow and most models are local.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    hidden_before = are_progress_bars_disabled()
    if not progress:
        disable_progress_bars()
    try:
        # The user says which model; only weights and settings are fetched, never code.
        snapshot = snapshot_download(  # nosec B615
            model, cache_dir=cache, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except RepositoryNotFoundError as error:  # includes gated repositories
        raise ConfigError(
            f"{model}: no such model on the Hugging Face Hub, or it is private or gated: for those, accept "
            "its terms on the Hub and set HF_TOKEN"
        ) from error
    except Exception as error:  # which HTTP library it lets through depends on huggingface_hub's version
        raise ConfigError(
            f"{model}: not in the cache, and fetching it from the Hugging Face Hub failed: {error} Check "
            "the network, or name a directory or a .gguf file that you have"
        ) from error
    finally:
        if not hidden_before:
            enable_progress_bars()
    return require_complete(Path(snapshot), model)


def require_complete(directory: Path, model: str) -> Path:
    """Returns the directory after checking that it holds a configuration and all the weight files.

    Raises:
        ConfigError: it does not.
    """
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{model}: has no config.json, so it is not a model in Hugging Face layout")
    check_small_files(directory)
    index = directory / INDEX_FILE
    if index.is_file():
        missing = [name for name in indexed_files(index) if not (directory / name).is_file()]
        if missing:
            raise ConfigError(f"{model}: weight files are missing: {', '.join(missing)}; fetch it again")
    elif not any(directory.glob("*.safetensors")):
        raise ConfigError(f"{model}: has no safetensors weights; other formats are not read")
    return directory
