"""Adapters as PEFT writes them are read, and damaged or hostile ones refused with what is wrong."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.lora.adapter import Adapter
from engine.lora.reader import read_adapter
from pagewire.base.errors import ConfigError
from pagewire.hub.adapters import adapter_digest, resolve_adapter
from tests.integration.tiny_adapters import KINDS, merged, write_adapter
from tests.integration.tiny_families import write_tiny

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(base, "plain", tmp_path_factory.mktemp("plain"))


@pytest.fixture
def adapter(plain: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


def applied(adapter: Adapter, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The base's weights with an adapter in them, by this package's reading of it."""
    state = dict(state)
    for module, matrix in adapter.matrices.items():
        state[f"{module}.weight"] = matrix.merged(state[f"{module}.weight"])
        if matrix.bias is not None:
            state[f"{module}.bias"] = state[f"{module}.bias"] + matrix.bias
    for module, matrix in adapter.embeddings.items():
        state[f"{module}.weight"] = state[f"{module}.weight"] + matrix.delta().T
    state |= {f"{module}.weight": tensor for module, tensor in adapter.saved.items()}
    return state | {f"{module}.bias": tensor for module, tensor in adapter.biases.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_configuration_is_read_as_peft_merges_it(kind: str, base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    adapter = read_adapter(write_adapter(base, kind, tmp_path))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    ours, theirs = applied(adapter, plain), merged(base, tmp_path).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    changed = [name for name in theirs if not torch.equal(theirs[name], plain[name])]
    assert changed


def test_ms_swift_s_layout_is_that_adapter_in_a_folder_with_its_name_in_every_tensor_s(
    plain: Path, tmp_path: Path
) -> None:
    inner = tmp_path / "checkpoint-100" / "default"
    inner.mkdir(parents=True)
    config = json.loads((plain / "adapter_config.json").read_text())
    config["swift_type"] = config.pop("peft_type")
    (inner / "adapter_config.json").write_text(json.dumps(config))
    renamed = {
        name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): tensor
        for name, tensor in load_file(plain / "adapter_model.safetensors").items()
    }
    torch.save(renamed, inner / "adapter_model.bin")
    ours, expected = read_adapter(resolve_adapter(str(tmp_path / "checkpoint-100"))), read_adapter(plain)
    assert ours.matrices.keys() == expected.matrices.keys()
    for module, matrix in expected.matrices.items():
        assert torch.equal(ours.matrices[module].delta(), matrix.delta())


def test_copies_have_the_same_digest_and_other_numbers_another(plain: Path, adapter: Path) -> None:
    assert adapter_digest(adapter) == adapter_digest(plain)
    change(lambda tensors: tensors[f"{Q_PROJ}.lora_B.weight"].add_(1e-3))(adapter)
    assert adapter_digest(adapter) != adapter_digest(plain)


def change(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Edits the tensors of an adapter."""

    def apply(directory: Path) -> None:
        tensors = load_file(directory / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, directory / "adapter_model.safetensors")

    return apply


def configure(**values: Any) -> Callable[[Path], None]:
    """Edits the configuration of an adapter."""

    def apply(directory: Path) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


def as_pickle(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()
    with (directory / "adapter_model.bin").open("wb") as file:
        pickle.dump({"weight": Evil()}, file)


def as_hostile_archive(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()
    torch.save({f"{Q_PROJ}.lora_A.weight": Evil()}, directory / "adapter_model.bin")


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q_PROJ}.lora_A.weight"][0, 0] = float("nan")


def cut(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def elsewhere(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    target = directory.parent / "elsewhere.safetensors"
    path.rename(target)
    path.symlink_to(target)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "has neither adapter_model.safetensors"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "is not valid JSON"),
        (as_pickle, "cannot be read as a PyTorch checkpoint"),
        (as_hostile_archive, "cannot be read as a PyTorch checkpoint"),
        (cut, "cannot be read as safetensors"),
        (elsewhere, "is a link to"),
        (change(poison), "numbers that are not finite"),
        (change(lambda t: t.pop(f"{Q_PROJ}.lora_A.weight")), "self_attn.q_proj has no lora_A"),
        (
            change(lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.zeros(3, 64)})),
            r"shapes \[3, 64\] and \[64, 8\]",
        ),
        (change(lambda t: t.update({"x.lora_A.weight": torch.zeros(2, 3, 4)})), "a matrix or a vector"),
        (
            change(lambda t: t.update({"x.lora_A.weight": torch.zeros(2, 3, dtype=torch.int8)})),
            "is of torch.int8",
        ),
        (change(lambda t: t.update({"x.adapter_down": torch.zeros(2, 3)})), "is no tensor of a LoRA adapter"),
        (change(lambda t: t.clear()), "has no tensor of an adapter"),
        (configure(peft_type="IA3"), "peft_type is 'IA3'; supported is 'LORA'"),
        (configure(r=0), "r is 0"),
        (configure(r="8"), "r is '8'; it must be a number"),
        (configure(r=16), "has rank 8; .* says 16"),
        (configure(use_dora=True), "has no lora_magnitude_vector"),
        (configure(init_lora_weights="pissa_niter_4"), "changes the base model's weights too"),
        (configure(trainable_token_indices=[1]), "trainable_token_indices is set"),
        (configure(bias="some"), "bias is 'some'; it must be one of none, all, lora_only"),
        (configure(target_modules=["c_attn"]), "target_modules has 'c_attn', of which the tensors have none"),
        (
            configure(modules_to_save=["lm_head"]),
            "modules_to_save has lm_head, of which there are no weights",
        ),
        (configure(alpha_pattern={"(a+)+$": 1}), "at most 256 characters and two repetitions"),
        (configure(alpha_pattern={".*.*.*q_proj": 1}), "at most 256 characters and two repetitions"),
        (configure(alpha_pattern={"q_(": 1}), "is no regular expression"),
    ],
)
def test_a_damaged_or_hostile_adapter_is_refused_with_what_is_wrong(
    damage: Callable[[Path], Any], message: str, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(adapter)
    with pytest.raises(ConfigError, match=message):
        read_adapter(adapter)
    assert capsys.readouterr().out == ""


def test_a_rank_above_the_largest_that_is_served_is_refused(plain: Path) -> None:
    with pytest.raises(ConfigError, match="has rank 8; max_lora_rank allows 4"):
        read_adapter(plain, max_rank=4)


def test_what_is_neither_a_directory_nor_on_a_hub_is_no_adapter() -> None:
    with pytest.raises(ConfigError, match="there is no such directory"):
        resolve_adapter("/nowhere/at/all")
