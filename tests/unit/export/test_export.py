"""What `pagewire export` writes: files that others read, the same model, whatever ends it early."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.models.families import load_model_config
from pagewire.base.errors import ConfigError
from pagewire.export.config import ExportConfig
from pagewire.export.run import export_hf
from tests.integration.tiny_families import reference, write_tiny
from tests.unit.engine.test_quantized_models import assert_alike
from tests.unit.export.models import (
    all_tensors,
    write_dataset,
    write_dequantized,
    write_exportable,
    write_tokenizer,
)

TEXTS: dict[str, Any] = {"num_samples": 32, "sample_length": 32, "device": "cpu"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exportable(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("texts") / "texts.jsonl")


def exported(model: Path, out: Path, texts: Path | None, **settings: Any) -> Path:
    dataset = None if settings.get("quant_method") in (None, "fp8") else texts
    return export_hf(ExportConfig(model=str(model), out=out, dataset=dataset, **{**TEXTS, **settings})).path


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "awq", "group_size": 32},
        {"quant_method": "awq", "group_size": -1},
        {"quant_method": "gptq", "group_size": 32},
        {"quant_method": "gptq", "quant_bits": 8},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_integers_have_the_log_probabilities_of_what_they_stand_for(
    plain: Path, texts: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    made = exported(plain, tmp_path / "made", texts, **settings)
    assert_alike(made, write_dequantized(made, tmp_path / "dequantized"))
    assert load_model_config(made).quantization is not None
    assert sorted(path.name for path in made.iterdir() if "safetensors" not in path.name) == [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
    ]


@pytest.mark.parametrize("method", ["fp8", "int8"])
def test_eight_bits_are_near_the_model_that_they_were_made_of(
    plain: Path, texts: Path, tmp_path: Path, method: str
) -> None:
    made = exported(plain, tmp_path / "made", texts, quant_method=method)
    dequantized = write_dequantized(made, tmp_path / "dequantized")
    ours, theirs = reference(dequantized), reference(plain)
    ids = [5, 9, 33, 7, 21, 60, 3]
    exact, told = theirs(ids).log_softmax(-1), ours(ids).log_softmax(-1)
    assert (exact.exp() * (exact - told)).sum(-1).mean() < 0.1
    assert load_model_config(made).quantization is not None


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_looking_at_activations_beats_rounding_to_nearest(
    plain: Path, texts: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's inputs are far from random: most channels are small, and some of them much larger."""
    ids = [(7 * index + 3) % 60 for index in range(48)]
    skewed = _with_skewed_activations(plain, tmp_path / "skewed")
    exact = reference(skewed)(ids).log_softmax(-1)

    def error_of(name: str) -> float:
        made = exported(skewed, tmp_path / name, texts, quant_method=method, group_size=32)
        told = reference(write_dequantized(made, tmp_path / f"{name} dequantized"))(ids).log_softmax(-1)
        return float((exact.exp() * (exact - told)).sum(-1).mean())

    searched = error_of("searched")
    monkeypatch.setattr("pagewire.export.methods.Method.needs_texts", False)
    assert searched < 0.85 * error_of("nearest")


def _with_skewed_activations(plain: Path, target: Path) -> Path:
    from safetensors.torch import load_file, save_file

    tensors = load_file(plain / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor *= torch.exp(1.2 * torch.randn(tensor.shape, generator=generator))
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (target / name).write_bytes((plain / name).read_bytes())
    return target


FAMILIES = ["mixtral", "gemma2", "phi3", "cohere", "stablelm-parallel"]
MORE_FAMILIES = ["qwen2-moe", "qwen3-moe", "gemma3", "olmo2", "glm4", "granite", "qwen3", "cohere-plus"]


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE_FAMILIES)]
)
def test_scaling_changes_no_family(
    family: str, tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With so fine a grid that rounding loses nothing, what AWQ moves between matrices must cancel out."""
    from pagewire.export import awq

    model = write_tiny(family, tmp_path / "model", intermediate_size=96)
    write_tokenizer(model)
    moved = 0

    def some_scales(inputs: Any, weights: Any, statistics: Any, group_size: int) -> torch.Tensor | None:
        nonlocal moved
        moved += 1
        magnitudes = inputs.magnitudes(statistics)
        return None if magnitudes is None else (magnitudes / magnitudes.mean()).sqrt().clamp(0.2, 5)

    monkeypatch.setattr(awq, "search_scales", some_scales)
    monkeypatch.setattr("pagewire.export.methods.awq_tensors", lambda integers: {"weight": integers.weight()})
    monkeypatch.setattr(awq, "BITS", 20)
    monkeypatch.setattr("pagewire.export.integers._in_fp16", lambda scales: scales.clamp(min=1e-12))
    monkeypatch.setattr(awq, "_CLIP_STEPS", 1)
    made = exported(model, tmp_path / "made", texts, quant_method="awq", group_size=8)
    config = json.loads((made / "config.json").read_text())
    del config["quantization_config"]
    (made / "config.json").write_text(json.dumps(config))
    ids = [5, 9, 33, 7, 21, 60, 3, 44, 120, 250]
    expected, told = reference(model)(ids), reference(made)(ids)
    assert moved >= 6
    assert torch.allclose(told, expected, atol=2e-3 * float(expected.abs().max()))
    before, after = all_tensors_of(model), all_tensors(made)
    assert before.keys() == after.keys()
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items() if "o_proj" in name)


def all_tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def test_goes_on_where_it_was_killed(tmp_path: Path, texts: Path) -> None:
    model = write_exportable(tmp_path / "model", num_hidden_layers=10)
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "pagewire", "export", str(model), str(out), "--quant-method", "gptq"]
    command += ["--dataset", str(texts), "--num-samples", "32", "--sample-length", "32", "--device", "cpu"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    while len(list(out.glob("model-*.safetensors"))) < 2:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("model-*.safetensors")}
    assert 2 <= len(done) < 11
    assert not (out / "config.json").exists()
    settings = {"quant_method": "gptq"}
    with pytest.raises(ConfigError, match="unfinished export of another model or with other settings"):
        exported(model, out, texts, quant_method="awq")
    exported(model, out, texts, **settings)
    assert all((out / name).stat().st_mtime_ns == written for name, written in done.items())
    whole = exported(model, tmp_path / "whole", texts, **settings)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


def test_plain_weights_are_copied_as_they_are(plain: Path, tmp_path: Path) -> None:
    made = exported(plain, tmp_path / "made", None)
    assert all(torch.equal(tensor, all_tensors_of(plain)[name]) for name, tensor in all_tensors(made).items())
    halves = all_tensors(exported(plain, tmp_path / "halves", None, dtype="bfloat16"))
    assert {tensor.dtype for tensor in halves.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"quant_method": "awq", "quant_bits": 8}, "quant_bits is 8; it must be 4 for awq"),
        ({"quant_method": "nf4"}, "quant_method is 'nf4'; it must be awq, gptq, fp8, int8"),
        ({"quant_bits": 4}, "quant_bits is given without quant_method"),
        ({"quant_method": "fp8", "group_size": 64}, "fp8 has a scale for each output"),
        ({"quant_method": "awq", "to": "gguf"}, "give gguf_type"),
        ({"to": "onnx"}, "to is 'onnx'; it must be hf or gguf"),
    ],
)
def test_settings_that_no_model_can_have_are_refused(
    plain: Path, tmp_path: Path, settings: dict[str, Any], what: str
) -> None:
    with pytest.raises(ConfigError, match=what):
        ExportConfig(model=str(plain), out=tmp_path / "out", **settings)


def test_what_does_not_fit_the_model_is_refused_before_anything_is_written(
    plain: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"does not divide the 128 inputs of model.layers.0.*64, 32, -1"):
        exported(plain, out, texts, quant_method="awq", group_size=48)
    odd = write_exportable(tmp_path / "odd", vocab_size=64, intermediate_size=100)
    with pytest.raises(ConfigError, match=r"mlp.* both must be multiples of 8"):
        exported(odd, out, texts, quant_method="gptq", group_size=-1)
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        exported(plain, out, texts, quant_method="awq")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("pagewire.export.run.shutil.disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"needs 1 MB in .* and 0 MB are"):
        exported(plain, tmp_path / "full", texts, quant_method="awq")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('{"text": "w1"}\n{"txt": "w2"}\n', "line 2 has no text"),
        ('{"text": "w1"}\nnonsense\n', "line 2 is not JSON"),
        ('{"text": "w1 w2 w3"}\n', "has 3 tokens; calibration needs 32 at least"),
        ('{"messages": [{"role": "user", "content": 3}]}\n', "line 1 has no text"),
    ],
)
def test_texts_that_are_none_are_refused(plain: Path, tmp_path: Path, content: str, what: str) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigError, match=what):
        exported(plain, tmp_path / "out", file, quant_method="awq")


def test_experts_in_one_tensor_are_refused(tmp_path: Path, texts: Path) -> None:
    model = write_tiny("gpt-oss", tmp_path / "model")
    write_tokenizer(model)
    with pytest.raises(ConfigError, match="experts of layer 0 are one tensor"):
        exported(model, tmp_path / "out", texts, quant_method="awq", group_size=32)
