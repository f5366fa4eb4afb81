"""Weights streamed to a device by several threads: the same bytes, bounded memory, clear errors."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from engine.cpu.runner import CpuModelRunner
from engine.loader import stream
from engine.loader.stream import StoredTensor, stored_tensors, stream_tensors
from engine.loader.weights import _load_streamed
from pagewire.base.errors import ConfigError
from tests.unit.engine.test_loading import runner
from tests.unit.engine.tiny_model import CONFIG, tensors, write_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mixed_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(torch.seed())
    return {
        "large": torch.randn(1000, 37, generator=generator),
        "half": torch.randn(333, 5, generator=generator).half(),
        "brain": torch.randn(64, 64, generator=generator).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 7),
        "bytes": torch.randint(0, 256, (1001,), dtype=torch.uint8, generator=generator),
        "eighth": torch.randn(9, 3, generator=generator).to(torch.float8_e4m3fn),
        "flags": torch.rand(77, generator=generator) > 0.5,
        "longs": torch.randint(-(2**62), 2**62, (5, 5), generator=generator),
    }


@pytest.mark.parametrize("chunk_bytes", [64, 1000, 1 << 20])
@pytest.mark.parametrize("ahead_bytes", [0, 20_000, 1 << 30])
def test_every_byte_arrives_however_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, ahead_bytes: int
) -> None:
    monkeypatch.setattr(stream, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(stream, "AHEAD_BYTES", ahead_bytes)
    saved = mixed_tensors()
    save_file(saved, tmp_path / "a.safetensors", metadata={"format": "pt"})
    stored = stored_tensors(tmp_path / "a.safetensors")
    assert [tensor.begin for tensor in stored] == sorted(tensor.begin for tensor in stored)
    arrived = {item.name: tensor.cpu() for item, tensor in stream_tensors(stored, DEVICE)}
    assert arrived.keys() == saved.keys()
    for name, tensor in saved.items():
        assert arrived[name].dtype == tensor.dtype
        assert arrived[name].shape == tensor.shape
        same_bytes = arrived[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)
        assert torch.equal(*same_bytes), name


def test_no_more_is_begun_than_fits_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({f"{i:02}": torch.full((1000,), float(i)) for i in range(40)}, tmp_path / "a.safetensors")
    monkeypatch.setattr(stream, "AHEAD_BYTES", 3 * 4000)
    begun: list[str] = []
    begin = stream._Uploads.begin

    def noting_begin(self: stream._Uploads, stored: StoredTensor) -> object:
        begun.append(stored.name)
        return begin(self, stored)

    monkeypatch.setattr(stream._Uploads, "begin", noting_begin)
    for taken, (stored, tensor) in enumerate(
        stream_tensors(stored_tensors(tmp_path / "a.safetensors"), DEVICE)
    ):
        assert int(stored.name) == taken == int(tensor[-1])
        assert len(begun) <= taken + 3
    assert len(begun) == 40


def test_a_reader_that_stops_early_leaves_no_file_open(tmp_path: Path) -> None:
    save_file(mixed_tensors(), tmp_path / "a.safetensors")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with closing(stream_tensors(stored_tensors(tmp_path / "a.safetensors"), DEVICE)) as arriving:
        next(arriving)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def damaged(path: Path, damage: str) -> None:
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    match damage:
        case "cut":
            path.write_bytes(content[:-1])
        case "longer":
            path.write_bytes(content + b"\0")
        case "header cut":
            path.write_bytes(content[: header // 2])
        case "header too long":
            path.write_bytes((1 << 40).to_bytes(8, "little") + content[8:])
        case "wrong shape":
            path.write_bytes(content.replace(b'"shape":[1000,37]', b'"shape":[1000,38]'))
        case "unknown numbers":
            path.write_bytes(content.replace(b'"dtype":"BF16"', b'"dtype":"BF17"'))
        case "no header":
            path.write_bytes(b"")


@pytest.mark.parametrize(
    "damage",
    ["cut", "longer", "header cut", "header too long", "wrong shape", "unknown numbers", "no header"],
)
def test_a_damaged_file_is_refused_before_anything_is_read(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file(mixed_tensors(), path)
    damaged(path, damage)
    with pytest.raises(SafetensorError):
        stored_tensors(path)


def test_numbers_that_torch_does_not_have_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"odd": torch.zeros(4, dtype=torch.uint16)}, path)
    with pytest.raises(SafetensorError, match="'odd' is of U16; known are F64, F32"):
        stored_tensors(path)


def test_a_file_cut_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(mixed_tensors(), path)
    stored = stored_tensors(path)
    path.write_bytes(path.read_bytes()[: stored[-1].begin])
    with pytest.raises(SafetensorError, match=f"ends within tensor '{stored[-1].name}'"):
        list(stream_tensors(stored, DEVICE))


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams to the CPU too, as to any other device."""
    monkeypatch.setattr(
        "engine.loader.weights._load_mapped",
        lambda targets, checkpoint: _load_streamed(targets, checkpoint, torch.device("cpu")),
    )


def test_a_streamed_model_is_the_mapped_one(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    directories = [write_model(tmp_path / str(shards), shards=shards) for shards in (1, 3)]
    models: list[CpuModelRunner] = [runner(directory) for directory in directories]
    request.getfixturevalue("streamed")
    for directory, mapped in zip(directories, models, strict=True):
        for name, parameter in runner(directory).model.state_dict().items():
            assert torch.equal(parameter, mapped.model.state_dict()[name]), name


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("differs", [False, True])
def test_a_streamed_lm_head_is_used_where_it_differs_from_the_embedding(
    tmp_path: Path, differs: bool
) -> None:
    weights = tensors(CONFIG)
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding.flip(0) if differs else embedding.clone()
    loaded = runner(write_model(tmp_path, weights, shards=2)).model
    hidden = torch.randn(3, CONFIG["hidden_size"])
    expected = hidden @ weights["lm_head.weight"].T
    torch.testing.assert_close(loaded.compute_logits(hidden), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        ("model.layers.1.self_attn.k_proj.weight", None, "lacks 1 tensors of the model: model.layers.1."),
        ("model.layers.0.extra.weight", torch.zeros(1), "'model.layers.0.extra.weight' is not part of"),
        ("model.norm.weight", torch.zeros(33), "'model.norm.weight' has shape [33]; [32] is needed"),
    ],
)
def test_a_streamed_tensor_that_does_not_fit_is_named(
    tmp_path: Path, name: str, replacement: torch.Tensor | None, message: str
) -> None:
    weights = tensors(CONFIG)
    weights.pop(name, None)
    if replacement is not None:
        weights[name] = replacement
    with pytest.raises(ConfigError) as error:
        runner(write_model(tmp_path, weights))
    assert message in error.value.message
    assert str(tmp_path) in error.value.message


@pytest.mark.usefixtures("streamed")
def test_a_damaged_streamed_checkpoint_is_named(tmp_path: Path) -> None:
    path = write_model(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read as safetensors"):
        runner(tmp_path)
