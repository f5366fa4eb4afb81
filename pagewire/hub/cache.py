"""The model cache on disk: where it is, and how something gets into it whole or not at all."""

from __future__ import annotations

import fcntl
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pagewire.base.cache_home import cache_home
from pagewire.base.errors import ConfigError


def publish(target: Path, build: Callable[[Path], None], *, on_wait: Callable[[], None]) -> Path:
    """Returns `target`, a directory in the cache, after building it if it is not there yet.

    `build` fills an empty staging directory beside the target, which is then renamed: a reader sees the
    whole directory or none, however the builder dies. Of several processes one builds and the others wait.

    Args:
        on_wait: called once if another process is building it.

    Raises:
        ConfigError: the cache cannot be written.
    """
    if target.is_dir():
        return target
    with writing_locked(target, on_wait=on_wait):
        if not target.is_dir():
            _build(target, build)
    return target


@contextmanager
def writing_locked(target: Path, *, on_wait: Callable[[], None]) -> Iterator[None]:
    """Around writing a directory of the cache: of several processes one does and the others wait.

    Args:
        on_wait: called once if another process is at it.

    Raises:
        ConfigError: in place of an OSError inside: the cache cannot be written.
    """
    try:
        with _lock(cache_home() / "locks" / f"{_lock_name(target)}.lock", on_wait):
            yield
    except OSError as error:
        raise ConfigError(
            f"cannot write the model cache {cache_home()}: {error}; free some space there or set "
            "PAGEWIRE_HOME to a directory that can be written"
        ) from error


def require_free_space(directory: Path, needed: int, what: str) -> None:
    """Raises ConfigError unless the file system of `directory`, which need not exist, has `needed` bytes free
    for `what`."""
    existing = next(parent for parent in (directory, *directory.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConfigError(
            f"{what} needs {needed / 1e6:,.0f} MB in {directory} and {free / 1e6:,.0f} MB are free; "
            "free some space or set PAGEWIRE_HOME to another disk"
        )


def _build(target: Path, build: Callable[[Path], None]) -> None:
    staging = target.parent / f".{target.name}.partial"
    if staging.exists():  # its builder was killed: the lock is ours now
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    try:
        build(staging)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _lock_name(target: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", f"{target.parent.name}-{target.name}")


@contextmanager
def _lock(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds an exclusive lock on a file. The kernel frees it when the holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
