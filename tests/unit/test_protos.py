"""The wire contracts: linted, commented to the last field, and with current stubs."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet

ROOT = Path(__file__).resolve().parents[2]
PROTOS = sorted((ROOT / "protos").rglob("*.proto"))
BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or "buf"


def stubs_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stubs", ROOT / "tools" / "stubs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_stubs_are_those_of_the_protos() -> None:
    assert stubs_tool().drift() == []


def test_a_changed_stub_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = stubs_tool()
    shutil.copytree(ROOT / "pagewire", tmp_path / "pagewire", ignore=shutil.ignore_patterns("__pycache__"))
    stubs = tmp_path / "pagewire" / "inference" / "v1"
    (stubs / "inference_pb2.py").write_text("")
    (stubs / "inference_pb2.pyi").unlink()
    (stubs / "old_pb2.py").write_text("")
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    assert tool.drift() == [
        "pagewire/inference/v1/inference_pb2.py: out of date",
        "pagewire/inference/v1/inference_pb2.pyi: missing",
        "pagewire/inference/v1/old_pb2.py: no proto generates it",
    ]


@pytest.mark.parametrize("command", [("lint",), ("format", "--diff", "--exit-code")], ids=lambda c: c[0])
def test_buf_accepts_the_protos(command: tuple[str, ...]) -> None:
    run = subprocess.run([BUF, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[FileDescriptorProto]:
    """The compiled protos with their comments."""
    output = tmp_path_factory.mktemp("protos") / "set.binpb"
    options = ["--include_source_info", f"--descriptor_set_out={output}"]
    subprocess.run([*stubs_tool().protoc(), *options, *map(str, PROTOS)], check=True)
    return list(FileDescriptorSet.FromString(output.read_bytes()).file)


def declarations(file: FileDescriptorProto) -> dict[tuple[int, ...], str]:
    """Every message, field, oneof, enum, enum value, service and method by its source path, whose numbers
    are the field numbers of google/protobuf/descriptor.proto."""
    found: dict[tuple[int, ...], str] = {}
    for index, message in enumerate(file.message_type):
        found |= _of_message((4, index), message)
    for index, enum in enumerate(file.enum_type):
        found[5, index] = enum.name
        found |= {(5, index, 2, i): f"{enum.name}.{value.name}" for i, value in enumerate(enum.value)}
    for index, service in enumerate(file.service):
        found[6, index] = service.name
        found |= {(6, index, 2, i): f"{service.name}.{rpc.name}" for i, rpc in enumerate(service.method)}
    return found


def _of_message(path: tuple[int, ...], message: DescriptorProto) -> dict[tuple[int, ...], str]:
    found = {path: message.name}
    found |= {(*path, 2, i): f"{message.name}.{field.name}" for i, field in enumerate(message.field)}
    for index, oneof in enumerate(message.oneof_decl):
        if not oneof.name.startswith("_"):  # such a one stands for an `optional` field
            found[*path, 8, index] = f"{message.name}.{oneof.name}"
    for index, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            found |= _of_message((*path, 3, index), nested)
    return found


def test_every_declaration_is_commented(files: list[FileDescriptorProto]) -> None:
    assert len(files) == len(PROTOS) > 0
    for file in files:
        commented = {
            tuple(location.path)
            for location in file.source_code_info.location
            if location.leading_comments.strip()
        }
        declared = declarations(file)
        assert declared
        assert [name for path, name in declared.items() if path not in commented] == []
