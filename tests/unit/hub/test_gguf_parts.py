"""A GGUF model in several files is read as one."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from pagewire.base.errors import ConfigError
from pagewire.hub.gguf.reader import read_gguf
from pagewire.hub.resolve import resolve_model
from tests.unit.hub.conftest import BuildGguf

COUNT = 3


def part_name(number: int, count: int = COUNT) -> str:
    return f"tiny-{number:05}-of-{count:05}.gguf"


@pytest.fixture
def whole(build_gguf: BuildGguf) -> Path:
    return build_gguf()


@pytest.fixture
def parts(whole: Path, tmp_path: Path) -> list[Path]:
    """The same model, as llama.cpp splits it: all keys in the first part."""
    directory = tmp_path / "parts"
    directory.mkdir()
    return split(whole, directory)


def split(whole: Path, directory: Path) -> list[Path]:
    reader = gguf.GGUFReader(whole)
    groups = [group.tolist() for group in np.array_split(range(len(reader.tensors)), COUNT)]
    paths = []
    for index, group in enumerate(groups):
        writer = gguf.GGUFWriter(directory / part_name(index + 1), "llama")
        for field in reader.fields.values() if index == 0 else ():
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                subtype = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=subtype)
        writer.add_uint16("split.no", index)
        writer.add_uint16("split.count", COUNT)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for number in group:
            tensor = reader.tensors[number]
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(directory / part_name(index + 1))
    return paths


@pytest.mark.parametrize("named", range(COUNT))
def test_parts_are_one_model_whichever_is_named(whole: Path, parts: list[Path], named: int) -> None:
    expected, read = read_gguf(whole), read_gguf(parts[named])
    assert list(read.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert np.array_equal(read.tensors[name].data, tensor.data), name
    assert expected.metadata.items() <= read.metadata.items()
    assert read.path == parts[0]


def test_parts_are_converted_once_and_again_when_one_of_them_changes(
    whole: Path, parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEWIRE_HOME", str(tmp_path / "home"))
    converted = resolve_model(str(parts[0]))
    assert resolve_model(str(parts[2])) == converted
    expected = load_file(resolve_model(str(whole)) / "model.safetensors")
    weights = load_file(converted / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(np.array_equal(weights[name], values) for name, values in expected.items())

    split(whole, parts[0].parent)
    assert resolve_model(str(parts[0])) != converted


def test_missing_parts_are_named(parts: list[Path]) -> None:
    parts[1].unlink()
    with pytest.raises(ConfigError, match=rf"1 of its model's 3 parts are missing: {part_name(2)}"):
        read_gguf(parts[0])


def test_parts_of_different_models_are_refused(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(ConfigError, match=rf"{part_name(2)}: is part 3 of 3 by its metadata and part 2 of 3"):
        read_gguf(parts[0])


def test_a_part_that_was_renamed_is_not_taken_for_a_whole_model(parts: list[Path]) -> None:
    renamed = parts[0].rename(parts[0].with_name("model.gguf"))
    with pytest.raises(ConfigError, match=r"model\.gguf: is part 1 of 3 by its metadata"):
        read_gguf(renamed)


def test_a_tensor_in_two_parts_is_refused(whole: Path, tmp_path: Path) -> None:
    for index in range(2):
        writer = gguf.GGUFWriter(tmp_path / part_name(index + 1, 2), "llama")
        writer.add_uint16("split.no", index)
        writer.add_uint16("split.count", 2)
        writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with pytest.raises(ConfigError, match=r"00002-of-00002\.gguf: has the tensor 'output_norm.weight'"):
        read_gguf(tmp_path / part_name(1, 2))


@pytest.mark.parametrize("name", ["tiny-00000-of-00003.gguf", "tiny-00004-of-00003.gguf"])
def test_a_number_beyond_the_count_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="parts are numbered from 1"):
        read_gguf(tmp_path / name)
