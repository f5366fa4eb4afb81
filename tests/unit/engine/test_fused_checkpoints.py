"""Checkpoints that keep several matrices as one tensor load as those that keep them apart, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.cpu.attention import TorchAttentionBackend
from engine.cpu.ops import TorchLayerOps
from engine.layers.linear_method import DenseMethod, LinearMethod, SameMethod
from engine.layers.parallel import TensorParallel
from engine.loader.checkpoint import open_checkpoint
from engine.loader.load import create_model
from engine.loader.weights import load_weights
from engine.models import families
from engine.models.base import CausalLM, ModelContext
from engine.models.checkpoint_names import FusedLayout, gate_then_up, qkv_by_group, qkv_in_turn
from engine.models.config import ModelConfig
from engine.models.families import load_model_config
from pagewire.base.errors import ConfigError
from tests.unit.engine.packed_weights import GROUP, PackedInt4
from tests.unit.engine.tiny_model import CONFIG, tensors, write_model

CPU = torch.device("cpu")
# Four query heads, two key-value heads, eight channels each.
SHAPE = {**CONFIG, "attention_bias": True}
Tensors = dict[str, torch.Tensor]


def in_turn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.cat((q, k, v))


def by_group(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.cat((q[:16], k[:8], v[:8], q[16:], k[8:], v[8:]))


def fuse(weights: Tensors, fuse_qkv: Callable[..., torch.Tensor]) -> Tensors:
    """The same checkpoint with W_pack and gate_up_proj."""
    fused: Tensors = {}
    for name, tensor in weights.items():
        path, _, parameter = name.rpartition(".")
        parent, _, module = path.rpartition(".")
        if module == "q_proj":
            parts = (weights[f"{parent}.{each}_proj.{parameter}"] for each in "qkv")
            fused[f"{parent}.W_pack.{parameter}"] = fuse_qkv(*parts)
        elif module == "gate_proj":
            parts = (weights[f"{parent}.{each}_proj.{parameter}"] for each in ("gate", "up"))
            fused[f"{parent}.gate_up_proj.{parameter}"] = torch.cat(tuple(parts))
        elif module not in ("k_proj", "v_proj", "up_proj"):
            fused[name] = tensor
    return fused


def split_llama(patch: pytest.MonkeyPatch, split: dict[str, Callable[[ModelConfig], FusedLayout]]) -> None:
    """Makes Llama's checkpoints fuse these modules."""
    llama = families.FAMILIES["LlamaForCausalLM"]
    fused = replace(llama, names=replace(llama.names, split=split))
    patch.setitem(families.FAMILIES, "LlamaForCausalLM", fused)  # type: ignore[arg-type]


def load(directory: Path, parallel: TensorParallel, method: LinearMethod | None = None) -> CausalLM:
    context = ModelContext(
        load_model_config(directory),
        max_model_len=64,
        backend=TorchAttentionBackend(CPU, torch.float32),
        ops=TorchLayerOps(CPU),
        linear_methods=SameMethod(method or DenseMethod()),
        parallel=parallel,
    )
    model = create_model(context, CPU, torch.float32)
    load_weights(model, open_checkpoint(directory), CPU)
    return model


@pytest.mark.parametrize("parallel", [TensorParallel(), TensorParallel(1, 2)], ids=["alone", "rank 1 of 2"])
@pytest.mark.parametrize(("layout", "fuse_qkv"), [(qkv_in_turn, in_turn), (qkv_by_group, by_group)])
def test_parameters_are_those_of_the_checkpoint_that_keeps_them_apart(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: Callable,
    fuse_qkv: Callable,
    parallel: TensorParallel,
) -> None:
    weights = tensors(SHAPE)
    expected = load(write_model(tmp_path / "apart", weights, **SHAPE), parallel).state_dict()
    split_llama(monkeypatch, {"W_pack": layout, "gate_up_proj": gate_then_up})
    fused = write_model(tmp_path / "fused", fuse(weights, fuse_qkv), **SHAPE)
    actual = load(fused, parallel).state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def packed(weights: Tensors) -> Tensors:
    """The same names as PackedInt4 stores its matrices, of random numbers; q, k and v have one scale."""
    stored: Tensors = {}
    for name, tensor in weights.items():
        if "_proj" not in name:
            stored[name] = tensor
            continue
        module = name.removesuffix(".weight")
        num_outputs, num_inputs = tensor.shape
        stored[f"{module}.qweight"] = torch.randint(2**31, (num_inputs // 8, num_outputs)).int()
        stored[f"{module}.scales"] = torch.rand(num_inputs // GROUP, num_outputs)
        stored[f"{module}.matrix_scale"] = torch.tensor(0.5)
    return stored


def fuse_packed(weights: Tensors) -> Tensors:
    """The same checkpoint with W_pack."""
    fused: Tensors = {}
    for name, tensor in weights.items():
        if ".q_proj." in name:
            parts = [weights[name.replace(".q_", f".{each}_")] for each in "qkv"]
            fused[name.replace("q_proj", "W_pack")] = torch.cat(parts, dim=1) if tensor.dim() else tensor
        elif ".k_proj." not in name and ".v_proj." not in name:
            fused[name] = tensor
    return fused


def test_packed_matrices_are_split_where_their_output_features_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second dimension; what has none is for each of them."""
    weights, method = packed(tensors(CONFIG)), PackedInt4()
    expected = load(write_model(tmp_path / "apart", weights), TensorParallel(), method).state_dict()
    split_llama(monkeypatch, {"W_pack": qkv_in_turn})
    fused = write_model(tmp_path / "fused", fuse_packed(weights))
    actual = load(fused, TensorParallel(), method).state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        ("W_pack.weight", torch.zeros(65, 32), "W_pack.weight' has shape [65, 32]; a multiple of 8"),
        ("W_pack.weight", torch.zeros(64, 31), "W_pack.weight' has shape [32, 31]; [32, 32] is needed"),
        ("W_pack.weight", None, "lacks 3 tensors of the model: model.layers.0.self_attn.k_proj.weight"),
        ("q_proj.weight", torch.zeros(32, 32), "q_proj.weight' is in"),
    ],
    ids=["rows", "columns", "missing", "twice"],
)  # fmt: skip
def test_a_fused_tensor_that_does_not_fit_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    replacement: torch.Tensor | None,
    message: str,
) -> None:
    split_llama(monkeypatch, {"W_pack": qkv_in_turn, "gate_up_proj": gate_then_up})
    weights = fuse(tensors(SHAPE), in_turn)
    if replacement is None:
        del weights[f"model.layers.0.self_attn.{name}"]
    else:
        weights[f"model.layers.0.self_attn.{name}"] = replacement
    with pytest.raises(ConfigError) as error:
        load(write_model(tmp_path, weights, **SHAPE), TensorParallel())
    assert message in error.value.message


def test_a_family_that_does_not_fuse_refuses_fused_tensors(tmp_path: Path) -> None:
    directory = write_model(tmp_path, fuse(tensors(SHAPE), in_turn), **SHAPE)
    with pytest.raises(ConfigError, match="tensors are not part of this model"):
        load(directory, TensorParallel())
