"""What a model's directory tells of its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from frontend.checkpoint import CheckpointFacts
from pagewire.base.errors import ConfigError

CONFIG = {"model_type": "llama", "hidden_size": 8, "rope_theta": 1e4, "tie_word_embeddings": True}


def directory(path: Path, *, config: Any = CONFIG, header: bytes | None = None) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    if header is None:
        tensors = {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "BF16", "shape": [3, 4], "data_offsets": [0, 24]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]},
        }
        header = json.dumps(tensors).encode()
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return path


def test_facts_are_those_of_the_files(tmp_path: Path) -> None:
    facts = CheckpointFacts.load(directory(tmp_path))
    assert (facts.family, facts.weight_format) == ("llama", "safetensors")
    assert (facts.num_parameters, facts.number_format) == (14, "BF16")
    assert facts.size == (tmp_path / "model.safetensors").stat().st_size
    assert facts.number("hidden_size") == 8
    assert facts.number("model_type") is None
    assert facts.number("tie_word_embeddings") is None


def test_other_weights_have_another_digest(tmp_path: Path) -> None:
    first = CheckpointFacts.load(directory(tmp_path)).digest
    assert len(first) == 64
    assert CheckpointFacts.load(directory(tmp_path)).digest == first
    assert CheckpointFacts.load(directory(tmp_path, config={**CONFIG, "hidden_size": 9})).digest != first
    assert CheckpointFacts.load(directory(tmp_path, header=b"{ }")).digest != first


def test_packed_weights_are_told_by_their_method_and_not_counted(tmp_path: Path) -> None:
    packed = {**CONFIG, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    facts = CheckpointFacts.load(directory(tmp_path, config=packed))
    assert (facts.num_parameters, facts.number_format) == (None, "GPTQ-4bit")


def test_a_model_of_several_parts_is_told_of_by_its_text(tmp_path: Path) -> None:
    facts = CheckpointFacts.load(directory(tmp_path, config={"text_config": CONFIG, "model_type": "seen"}))
    assert facts.family == "llama"


@pytest.mark.parametrize(
    "header", [b"", b"{", b"[]", b"[" * 100_000, b'{"a": {"shape": ["x"]}}', b'{"a": 1}']
)
def test_weights_that_cannot_be_read_are_unknown_and_stop_nothing(tmp_path: Path, header: bytes) -> None:
    facts = CheckpointFacts.load(directory(tmp_path, header=header))
    assert (facts.num_parameters, facts.number_format) == (None, "")


def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path: Path) -> None:
    directory(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 16)
    assert CheckpointFacts.load(tmp_path).num_parameters is None


def test_a_directory_without_a_config_tells_nothing_and_a_wrong_one_is_an_error(tmp_path: Path) -> None:
    assert CheckpointFacts.load(tmp_path) == CheckpointFacts()
    with pytest.raises(ConfigError, match=r"config\.json"):
        CheckpointFacts.load(directory(tmp_path, config=[]))
