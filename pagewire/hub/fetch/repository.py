"""From a repository on a hub to the files of its model, whichever hub it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from pagewire.base.errors import ConfigError
from pagewire.hub.cache import require_free_space, writing_locked
from pagewire.hub.fetch.selection import gguf_files, has_safetensors, has_weights, small_files, weight_files
from pagewire.hub.fetch.transfer import HubRefused, HubUnreachable, is_disk_full
from pagewire.hub.model_files import (
    WEIGHT_FILES,
    check_small_files,
    find_weight_files,
    indexed_files,
    other_weights_hint,
)
from pagewire.hub.progress import Advance, report_progress, say


class Repository(Protocol):
    """A model's repository at one revision, and the part of it that is on disk.

    Attributes:
        name: owner/name.
        hub_title: what people call the hub.
        directory: of the hub's cache, where all revisions of it lie.
    """

    name: str
    hub_title: str
    directory: Path

    def list_files(self) -> Mapping[str, int]:
        """The size in bytes of each file, by path.

        Raises:
            HubUnreachable: the hub cannot be asked.
            ConfigError: it refuses.
        """
        ...

    def missing_bytes(self, names: Collection[str]) -> int:
        """How much of these files is to be fetched. Raises as `list_files`."""
        ...

    def fetch(self, names: Collection[str], advance: Advance) -> Path:
        """The directory that has these files of the listed ones, after fetching those that are not there.

        Raises:
            HubUnreachable: the network failed.
            HubRefused: the hub refuses a file.
            ConfigError: the hub refuses for a reason that it gives, or a file is damaged.
            OSError: the disk failed.
        """
        ...

    def cached(self) -> Path | None:
        """The directory of what was fetched before."""
        ...


def fetch_model(repository: Repository, *, file: str | None, load_format: str, progress: bool) -> Path:
    """The directory of a model in Hugging Face layout, or a GGUF file, fetched as far as it is not there. Of
    a GGUF model in several parts all are fetched, and the first is returned.

    Without a network what was fetched before is used.

    Args:
        file: which GGUF file is wanted; see `ModelReference`.
        load_format: "gguf" or "safetensors" insist on that, "dummy" needs no weights; any other takes what
            there is, Hugging Face layout first.

    Raises:
        ConfigError: there is no such model, it may not be read, cannot be reached or written, or has no
            weights.
    """
    try:
        return _fetch(repository, file, load_format, progress=progress)
    except HubUnreachable as error:
        return _from_cache(repository, file, load_format, error)
    except HubRefused as error:
        raise ConfigError(f"{repository.name}: {repository.hub_title} refuses a file: {error}") from error
    except OSError as error:
        raise ConfigError(
            f"{repository.name}: the model cache {repository.directory} cannot be used: {error}; set "
            "PAGEWIRE_HOME to a directory that can be written"
        ) from error


def fetch_files_of(
    repository: Repository, choose: Callable[[str, list[str]], list[str]], *, progress: bool
) -> Path:
    """The directory that has the files which `choose` wants, given the repository's name and its files.
    Without a network what was fetched before is used.

    Raises:
        ConfigError: as `fetch_model`, or as `choose`.
    """
    try:
        files = repository.list_files()
        return _fetch_files(repository, files, choose(repository.name, list(files)), progress=progress)
    except HubUnreachable as error:
        directory = repository.cached()
        if directory is None:
            raise ConfigError(
                f"{repository.name}: not in the cache, and {repository.hub_title} cannot be asked: {error}"
            ) from error
        choose(repository.name, [str(path.relative_to(directory)) for path in directory.rglob("*")])
        return directory
    except HubRefused as error:
        raise ConfigError(f"{repository.name}: {repository.hub_title} refuses a file: {error}") from error
    except OSError as error:
        raise ConfigError(
            f"{repository.name}: the model cache {repository.directory} cannot be used: {error}; set "
            "PAGEWIRE_HOME to a directory that can be written"
        ) from error


def _fetch(repository: Repository, file: str | None, load_format: str, *, progress: bool) -> Path:
    files = repository.list_files()
    if _wants_gguf(files, file, load_format):
        parts = gguf_files(repository.name, files, file)
        return _fetch_files(repository, files, parts, progress=progress) / parts[0]
    require_format(repository.name, files, load_format)
    small = small_files(files)
    if "config.json" not in small:
        raise _no_config(repository.name)
    directory = _fetch_files(repository, files, small, progress=False)
    check_small_files(directory)
    if load_format == "dummy":
        return directory
    weights = weight_files(repository.name, files, directory)
    return _fetch_files(repository, files, [*small, *weights], progress=progress)


def _fetch_files(
    repository: Repository, sizes: Mapping[str, int], names: Sequence[str], *, progress: bool
) -> Path:
    """The directory that has them. What is there already is read without a lock, whose file needs a disk that
    can be written."""
    if repository.missing_bytes(names) == 0:
        return repository.fetch(names, _silent)
    on_wait = f"Waiting for another process to fetch {repository.name}"
    with writing_locked(repository.directory, on_wait=lambda: say(on_wait, enabled=progress)):
        missing = repository.missing_bytes(names)
        require_free_space(repository.directory, missing, f"fetching {repository.name}")
        whole = sum(sizes[name] for name in set(names))
        label, done_before = f"Fetching {repository.name}", max(whole - missing, 0)
        with report_progress(label, whole, enabled=progress, done_before=done_before) as advance:
            try:
                return repository.fetch(names, advance)
            except OSError as error:
                if is_disk_full(error):
                    raise _no_space(repository) from error
                raise


def _no_space(repository: Repository) -> ConfigError:
    return ConfigError(
        f"{repository.name}: no space is left in {repository.directory.parent}; what was fetched stays, and "
        "the same command goes on from there when there is space, or set PAGEWIRE_HOME to another disk"
    )


def _from_cache(repository: Repository, file: str | None, load_format: str, error: HubUnreachable) -> Path:
    directory = repository.cached()
    if directory is None:
        raise ConfigError(
            f"{repository.name}: not in the cache, and {repository.hub_title} cannot be asked: {error}. "
            "Check the network, or name a directory or a .gguf file that you have"
        ) from error
    names = [str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()]
    try:
        if _wants_gguf(names, file, load_format):
            return directory / gguf_files(repository.name, names, file)[0]
        require_format(repository.name, names, load_format)
        if load_format == "dummy":
            return _require_config(directory, repository.name)
        return require_complete(directory, repository.name)
    except ConfigError as incomplete:
        raise ConfigError(
            f"{incomplete.message}. That is what the cache has; {repository.hub_title} cannot be asked for "
            f"more: {error}"
        ) from error


def _wants_gguf(names: Collection[str], file: str | None, load_format: str) -> bool:
    if file is not None or load_format == "gguf":
        return True
    return not has_weights(names) and any(name.lower().endswith(".gguf") for name in names)


def require_format(model: str, names: Collection[str], load_format: str) -> None:
    """Raises ConfigError if safetensors are asked for and there are none."""
    if load_format == "safetensors" and not has_safetensors(names):
        raise ConfigError(
            f"load_format is 'safetensors', and {model} has none; 'auto' takes the weights that it has",
            param="load_format",
        )


def require_complete(directory: Path, model: str) -> Path:
    """Returns the directory after checking that it holds a configuration and all the weight files.

    Raises:
        ConfigError: it does not.
    """
    _require_config(directory, model)
    found = find_weight_files(directory)
    if found is None:
        names = " nor ".join(files.single for files in WEIGHT_FILES)
        raise ConfigError(f"{model}: has neither {names}{other_weights_hint(directory)}")
    index = directory / found.index
    if index.is_file():
        missing = [name for name in indexed_files(index) if not (directory / name).is_file()]
        if missing:
            raise ConfigError(f"{model}: weight files are missing: {', '.join(missing)}; fetch it again")
    return directory


def _require_config(directory: Path, model: str) -> Path:
    if not (directory / "config.json").is_file():
        raise _no_config(model)
    check_small_files(directory)
    return directory


def _no_config(model: str) -> ConfigError:
    return ConfigError(f"{model}: has no config.json, so it is not a model in Hugging Face layout")


def _silent(_done: int) -> None:
    """Nothing is shown."""
