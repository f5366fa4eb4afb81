"""Checkpoints of torch.save: the same model as from safetensors, and nothing in them is ever run."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from torch import nn

from engine.loader import torch_file, weights
from engine.loader.checkpoint import open_checkpoint
from engine.loader.stream import stream_tensors
from engine.loader.torch_file import TorchFileError, stored_tensors
from pagewire.base.errors import ConfigError
from tests.unit.engine.test_loading import runner, tokens
from tests.unit.engine.tiny_model import CONFIG, tensors, write_model

CPU = torch.device("cpu")
INDEX = "pytorch_model.bin.index.json"


def write_bin_model(
    directory: Path, state: dict[str, torch.Tensor] | None = None, *, shards: int = 1, **changes: object
) -> Path:
    """As write_model, by torch.save."""
    config = {**CONFIG, **changes}
    state = tensors(config) if state is None else state
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        torch.save(state, directory / "pytorch_model.bin")
        return directory
    weight_map = {}
    for i in range(shards):
        name = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = dict(list(state.items())[i::shards])
        torch.save(part, directory / name)
        weight_map.update(dict.fromkeys(part, name))
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def read(path: Path) -> dict[str, torch.Tensor]:
    """A file's tensors, through its pages in memory."""
    with weights.mapped(path) as tensor_of:
        return {stored.name: tensor_of(stored).clone() for stored in stored_tensors(path)}


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_saved_by_torch_is_the_one_in_safetensors(tmp_path: Path, shards: int) -> None:
    expected = tokens(write_model(tmp_path / "safetensors"))
    assert tokens(write_bin_model(tmp_path / "bin", shards=shards)) == expected


def test_a_directory_with_both_is_read_from_safetensors(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"nobody looks at it")
    assert {path.name for path in open_checkpoint(tmp_path).files} == {"model.safetensors"}
    assert tokens(tmp_path)


def test_every_kind_of_number_and_layout_is_read_as_torch_does(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).view(4, 6)
    state = {
        **{str(dtype): torch.arange(6).to(dtype).view(2, 3) for dtype in torch_file._STORAGE_DTYPES.values()},
        "float8": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
        "transposed": base.t(),
        "rows of another": base[1:3],
        "columns": base[:, 2:4],
        "expanded": torch.tensor([7.0]).expand(3),
        "one row": base[:1],
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    state["parameter with attributes"] = nn.Parameter(torch.ones(3))
    state["parameter with attributes"].split = 2
    path = tmp_path / "pytorch_model.bin"
    torch.save(OrderedDict(state), path)
    expected = torch.load(path, weights_only=True)
    found = read(path)
    assert found.keys() == expected.keys()
    streamed = {stored.name: tensor for stored, tensor in stream_tensors(stored_tensors(path), CPU)}
    for name, tensor in expected.items():
        for got in (found[name], streamed[name]):
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape), name
            assert torch.equal(got.double(), tensor.detach().double()), name


def test_a_modules_own_state_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    layer = nn.Linear(3, 2)
    torch.save(layer.state_dict(), path)  # an OrderedDict with an attribute
    assert torch.equal(read(path)["weight"], layer.weight)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_numbers_are_converted_as_those_of_safetensors_are(
    tmp_path: Path, stored: torch.dtype, dtype: str
) -> None:
    state = {name: tensor.to(stored) for name, tensor in tensors(CONFIG).items()}
    ours = runner(write_bin_model(tmp_path / "bin", state), dtype=dtype).model.state_dict()
    theirs = runner(write_model(tmp_path / "safetensors", state), dtype=dtype).model.state_dict()
    for name, tensor in theirs.items():
        assert tensor.dtype is getattr(torch, dtype)
        assert torch.equal(ours[name], tensor), name


def test_a_tied_head_that_torch_kept_once_takes_no_memory(tmp_path: Path) -> None:
    state = tensors(CONFIG)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = runner(write_bin_model(tmp_path, state)).model
    assert not any("lm_head" in name for name, _ in model.named_parameters())


def test_only_the_header_is_read_to_list_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"large": torch.zeros(2**20)}, path)
    with path.open("rb") as file:
        read_so_far = 0
        original = file.read

        def counted(size: int = -1) -> bytes:
            nonlocal read_so_far
            data = original(size)
            read_so_far += len(data)
            return data

        monkeypatch.setattr(Path, "open", lambda *_: _Counted(file, counted))
        [stored] = stored_tensors(path)
    assert stored.num_bytes == 2**22
    assert read_so_far < 2**17


class _Counted:
    """A file whose reads are counted."""

    def __init__(self, file: io.BufferedReader, read: Callable[..., bytes]) -> None:
        self._file, self.read = file, read

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def __enter__(self) -> _Counted:
        return self

    def __exit__(self, *_: object) -> None:
        """Closed by who opened it."""


class _Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.write_text, (self._target, "harm")


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    harm = tmp_path / "harm.txt"
    state = {**tensors(CONFIG), "model.layers.0.trojan": _Attack(harm)}
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin cannot be read.*which is code and no tensor"):
        runner(write_bin_model(tmp_path, state))
    assert not harm.exists()


def _repack(path: Path, change: Callable[[str, bytes], bytes | None], compression: int = 0) -> None:
    """Writes the archive anew, with records changed or left out."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            changed = change(name, data)
            if changed is not None:
                archive.writestr(name, changed)


def _with_pickle(content: object) -> Callable[[Path], None]:
    data = pickle.dumps(content, protocol=2)
    return lambda path: _repack(path, lambda name, old: data if name.endswith("data.pkl") else old)


def _big_endian(path: Path) -> None:
    _repack(path, lambda name, data: b"big" if name.endswith("byteorder") else data)


def _compressed(path: Path) -> None:
    _repack(path, lambda _name, data: data, zipfile.ZIP_DEFLATED)


def _without_numbers(path: Path) -> None:
    _repack(path, lambda name, data: None if "/data/" in name else data)


def _short_numbers(path: Path) -> None:
    _repack(path, lambda name, data: data[:-1] if "/data/" in name else data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def _old(path: Path) -> None:
    torch.save(tensors(CONFIG), path, _use_new_zipfile_serialization=False)


def _broken_pickle(path: Path) -> None:
    _repack(path, lambda name, data: data[:-30] if name.endswith("data.pkl") else data)


def _huge_memo(path: Path) -> None:
    """Tells an unpickler to make room for four billion objects."""
    bomb = b"\x80\x02}r\xff\xff\xff\xff."
    _repack(path, lambda name, data: bomb if name.endswith("data.pkl") else data)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_cut, "damaged or cut short"),
        (_old, "the format that torch.save has had since PyTorch 1.6"),
        (_big_endian, "not little-endian"),
        (_compressed, "is compressed"),
        (_without_numbers, "are not in it"),
        (_short_numbers, "is larger than its numbers"),
        (_broken_pickle, "its header is damaged"),
        (_huge_memo, "lacks 20 tensors"),
        (_with_pickle([1, 2]), "holds a list; tensors by name are needed"),
        (_with_pickle({"state_dict": {"a": 1}}), "holds a dict under 'state_dict'"),
        (_with_pickle({"step": 3}), "holds a int under 'step'"),
        (_with_pickle({"a": complex(1, 2)}), "which is code and no tensor"),
        (lambda path: path.write_bytes(b""), "since PyTorch 1.6"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), "damaged or cut short"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    path = write_bin_model(tmp_path) / "pytorch_model.bin"
    damage(path)
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin cannot be read as a PyTorch|lacks") as error:
        runner(tmp_path)
    assert said in error.value.message


def test_no_damage_to_a_header_does_more_than_refuse_the_file(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2, 3), "b": nn.Parameter(torch.ones(4))}, path)
    whole = path.read_bytes()
    random = Random(0)
    outcomes = set()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(random.randint(1, 3)):
            data[random.randrange(len(data))] = random.randrange(256)
        path.write_bytes(data)
        try:
            stored = stored_tensors(path)
        except (TorchFileError, OSError):  # such as of a place that is negative
            outcomes.add("refused")
            continue
        assert all(tensor.begin + tensor.num_bytes <= len(whole) for tensor in stored)
        read(path)
        outcomes.add("read")
    assert outcomes == {"refused", "read"}


def test_a_cut_shard_is_named(tmp_path: Path) -> None:
    write_bin_model(tmp_path, shards=2)
    _cut(tmp_path / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(ConfigError, match="pytorch_model-00002-of-00002"):
        runner(tmp_path)


def test_a_shard_that_the_index_names_and_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_bin_model(tmp_path, shards=2)
    (tmp_path / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(
        ConfigError, match=r"index\.json names files that are not there: 'pytorch_model-00001"
    ):
        runner(tmp_path)


def test_a_shape_that_claims_more_than_the_record_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(4)}, path)
    _repack(path, lambda name, data: data.replace(b"K\x04\x85", b"K\x40\x85") if "pkl" in name else data)
    with pytest.raises(TorchFileError, match=r"'a' of shape \[64\] is larger than its numbers"):
        stored_tensors(path)


def test_other_files_of_weights_are_named_with_what_to_do(tmp_path: Path) -> None:
    write_bin_model(tmp_path)
    shutil.move(tmp_path / "pytorch_model.bin", tmp_path / "consolidated.00.pth")
    with pytest.raises(
        ConfigError, match=r"holds neither model\.safetensors.*'consolidated\.00\.pth' is not read"
    ):
        runner(tmp_path)
