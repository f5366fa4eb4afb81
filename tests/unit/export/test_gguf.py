"""Exports to GGUF, read back: the model that was written, in each family that GGUF has a name for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pagewire.base.errors import ConfigError
from pagewire.export.config import ExportConfig
from pagewire.export.gguf_file import export_gguf
from pagewire.hub.gguf.convert import convert_gguf
from pagewire.hub.gguf.reader import read_gguf
from tests.unit.hub import gguf_checkpoints as checkpoints

QUICK = ("llama-3.1", "gemma2", "qwen3moe", "stablelm-12b")


def written(case: str, directory: Path, **settings: Any) -> tuple[Path, dict[str, np.ndarray]]:
    """A GGUF file of a tiny checkpoint, and the checkpoint's tensors."""
    model = directory / "model"
    _, tensors = checkpoints.write_checkpoint(checkpoints.CASES[case], model)
    checkpoints._tokenizer().save(str(model / "tokenizer.json"))
    made = export_gguf(
        ExportConfig(model=str(model), out=directory / "made.gguf", to="gguf", device="cpu", **settings)
    )
    return made.path, tensors


@pytest.mark.parametrize(
    "case",
    [
        case if case in QUICK else pytest.param(case, marks=pytest.mark.slow)
        for case in checkpoints.CASES
        if case not in ("gpt-oss", "glm")
    ],
)
def test_a_file_is_read_back_as_the_checkpoint_that_it_was_made_of(case: str, tmp_path: Path) -> None:
    path, expected = written(case, tmp_path, gguf_type="f32")
    back = tmp_path / "back"
    back.mkdir()
    convert_gguf(path, back, progress=False)
    read = load_file(back / "model.safetensors")
    if "lm_head.weight" not in read:  # of a tied model whose file has it all the same
        expected.pop("lm_head.weight", None)
    assert read.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(read[name], values, err_msg=name)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0", "q4_1"])
def test_matrices_have_the_kind_that_is_asked_for(kind: str, tmp_path: Path) -> None:
    path, _ = written("llama", tmp_path, gguf_type=kind)
    kinds = {tensor.name: tensor.type.name.lower() for tensor in read_gguf(path).tensors.values()}
    assert kinds["blk.0.attn_q.weight"] == kind
    assert kinds["blk.0.attn_norm.weight"] == "f32"
    assert kinds["token_embd.weight"] == ("q8_0" if kind.startswith("q") else kind)


def test_what_gguf_has_no_place_for_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    checkpoints.write_checkpoint(checkpoints.CASES["mistral"], model)
    checkpoints._tokenizer().save(str(model / "tokenizer.json"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "sliding_window": 32}))
    out = tmp_path / "made.gguf"
    with pytest.raises(ConfigError, match="llama has no place for this model's layers"):
        export_gguf(ExportConfig(model=str(model), out=out, to="gguf"))
    with pytest.raises(ConfigError, match=r"must be the name of a new file that ends in .gguf"):
        export_gguf(ExportConfig(model=str(model), out=tmp_path / "made", to="gguf"))
    assert not out.exists()
