"""Reading a GGUF header: what is in the file, or an error that names the file."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagewire.base.errors import ConfigError
from pagewire.hub.gguf.reader import read_gguf


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    """One of each kind of metadata, and two tensors."""
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("a.string", "grüße")
    writer.add_bool("a.bool", True)
    writer.add_int32("a.int32", -7)
    writer.add_uint64("a.uint64", 2**63)
    writer.add_float32("a.float32", 0.5)
    writer.add_array("strings", ["x", "", "日本"])
    writer.add_array("ints", [1, -2, 3])
    writer.add_tensor("matrix", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("vector", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_and_tensors_come_back_as_written(small_file: Path) -> None:
    read = read_gguf(small_file)
    assert read.metadata == {
        "general.architecture": "llama",
        "a.string": "grüße",
        "a.bool": True,
        "a.int32": -7,
        "a.uint64": 2**63,
        "a.float32": 0.5,
        "strings": ["x", "", "日本"],
        "ints": [1, -2, 3],
    }
    assert read.tensors["matrix"].shape == (3, 4)
    matrix = read.tensors["matrix"].data.view(np.float32)
    assert np.array_equal(matrix, np.arange(12, dtype=np.float32).reshape(3, 4))
    assert read.tensors["vector"].data.view(np.float32).ravel().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("reading_once")
def test_agrees_with_the_gguf_package_on_a_real_file(smollm2_gguf: Path) -> None:
    ours, theirs = read_gguf(smollm2_gguf), gguf.GGUFReader(smollm2_gguf)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        assert np.array_equal(ours.tensors[tensor.name].data.ravel(), tensor.data.ravel().view(np.uint8))
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.chat_template"):
        assert ours.metadata[key] == theirs.fields[key].contents()


def test_a_file_cut_anywhere_is_refused_by_name(small_file: Path, tmp_path: Path) -> None:
    whole = small_file.read_bytes()
    data_end = len(whole.rstrip(b"\0"))  # the writer pads the last tensor
    cut = tmp_path / "cut.gguf"
    for size in range(data_end):
        cut.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=r"cut\.gguf"):
            read_gguf(cut)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(data=st.data())
def test_damaged_bytes_never_cause_anything_but_a_config_error(small_file: Path, data: st.DataObject) -> None:
    damaged = bytearray(small_file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(damaged) - 1))
        damaged[position] = data.draw(st.integers(0, 255))
    path = small_file.with_name("damaged.gguf")
    path.write_bytes(damaged)
    with suppress(ConfigError):  # it may also have hit a value, and then nothing is wrong
        read_gguf(path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"GGUF\x63\0\0\0" + bytes(16)])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"other\.gguf"):
        read_gguf(path)
