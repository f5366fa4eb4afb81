"""What users may type for MODEL, and what they are told when it is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pagewire.base.errors import ConfigError
from pagewire.hub import list_models, pull, resolve_model
from tests.unit.hub.conftest import BuildGguf


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAGEWIRE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_directory_in_hugging_face_layout_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_directory_without_configuration_is_refused_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").touch()
    with pytest.raises(ConfigError, match=r"config\.json.*weights\.gguf"):
        resolve_model(str(tmp_path))


def test_a_gguf_file_is_converted_once(home: Path, build_gguf: BuildGguf) -> None:
    path = build_gguf()
    directory = resolve_model(str(path))
    assert {file.name for file in directory.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    written = (directory / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(str(path)) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == written


def test_a_changed_gguf_file_is_converted_anew(home: Path, build_gguf: BuildGguf) -> None:
    path = build_gguf()
    first = resolve_model(str(path))
    os.utime(path, ns=(0, 1))
    assert resolve_model(str(path)) != first


def test_a_corrupt_gguf_file_leaves_nothing_in_the_cache(home: Path, build_gguf: BuildGguf) -> None:
    path = build_gguf()
    path.write_bytes(path.read_bytes()[:-10_000])
    with pytest.raises(ConfigError, match=r"tiny\.gguf: truncated"):
        resolve_model(str(path))
    assert list_models() == []
    assert list((home / "converted").iterdir()) == []


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("", "unknown model ''"),
        ("no-such-alias", "one of: smollm2-135m"),
        ("/nowhere/model.gguf", "/nowhere/model.gguf: cannot be read: No such file"),
        ("/nowhere/model", "unknown model '/nowhere/model'"),
        ("../a/b", "unknown model"),
    ],
)
def test_other_names_are_refused(model: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve_model(model)


def test_only_names_can_be_pulled(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be fetched"):
        pull(str(tmp_path))


def test_the_list_says_name_place_size_and_origin(home: Path, build_gguf: BuildGguf) -> None:
    assert list_models() == []
    directory = resolve_model(str(build_gguf()))
    snapshot = home / "huggingface" / "models--owner--name" / "blobs"
    snapshot.mkdir(parents=True)
    (snapshot / "blob").write_bytes(bytes(10))
    converted, fetched = list_models()
    assert (converted.name, converted.path, converted.source) == (
        str(directory),
        directory,
        "converted from GGUF",
    )
    assert converted.size == sum(file.stat().st_size for file in directory.iterdir())
    assert (fetched.name, fetched.size, fetched.source) == ("owner/name", 10, "the Hugging Face Hub")


def test_neither_resolving_nor_converting_imports_torch(home: Path, build_gguf: BuildGguf) -> None:
    script = (
        "import sys, json; from pagewire.hub import resolve_model; resolve_model(sys.argv[1]); "
        "print(json.dumps([name for name in ('torch', 'transformers') if name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(build_gguf())],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert json.loads(done.stdout) == []
