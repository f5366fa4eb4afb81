"""Layers of quantized weights: mixed formats, fused layers, ranks, random weights, weights quantized at load,
and the layouts themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.layers.linear import LinearLayer, MergedColumnParallelLinear, RowParallelLinear, SeparateProducts
from engine.layers.linear_method import LinearMethod, SameMethod
from engine.layers.parallel import TensorParallel
from engine.loader.fingerprint import fingerprint
from engine.quant.bits import pack_words, unpack_words
from engine.quant.layouts import base
from engine.quant.layouts.base import Layout
from engine.quant.layouts.fp8 import Fp8Channels
from engine.quant.layouts.groups import Int8Groups, PackedGroups
from engine.quant.layouts.table import TableWeights
from engine.quant.methods.at_load import quantized
from engine.quant.methods.base import NothingStored, StoredShape
from engine.quant.methods.choose import METHODS
from engine.quant.products import LayoutProducts
from engine.quant.schemes import Activations, Awq, BnbTable, Fp8, Gptq, Int8, PackedInts, Scheme, SqueezeLlm
from pagewire.base.errors import ConfigError
from tests.unit.engine import quantized_checkpoints as files
from tests.unit.engine.quantized_checkpoints import CONFIG, Case, Quantize, compressed, write_both, write_pair
from tests.unit.engine.test_loading import runner
from tests.unit.engine.test_quantized_models import (
    AWQ,
    CASES,
    CHANNEL_8,
    FP8,
    GROUPS_4,
    INPUT_CASES,
    assert_alike,
    logprobs,
    logprobs_of,
)
from tests.unit.engine.tiny_model import CONFIG as TINY
from tests.unit.engine.tiny_model import tensors, write_model

K, N = 128, 64


def method(scheme: Scheme, stored: dict[str, torch.Tensor] | None = None) -> LinearMethod:
    found = NothingStored() if stored is None else Stored(stored)
    return METHODS[type(scheme)](scheme, LayoutProducts(), found)


class Stored:
    """A checkpoint that has these tensors of every matrix."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def find(self, layer: str, shard: str, tensor: str) -> StoredShape | None:
        stored = self._tensors.get(tensor)
        return None if stored is None else StoredShape(tuple(stored.shape), stored.dtype)


def load(layer: LinearLayer, matrices: dict[str, dict[str, torch.Tensor]]) -> tuple[Layout, ...]:
    names = {
        getattr(parameter, "file_name", "") or name: name
        for name, parameter in layer.named_parameters(recurse=False)
    }
    for shard, stored in matrices.items():
        for name, tensor in stored.items():
            layer.load_parameter(names[name], tensor, shard or None)
    layer.finish_loading()
    return layer.layouts


SPLIT: dict[str, tuple[Scheme, Quantize]] = {
    "awq": (Awq(32), files.awq(32)),
    "awq, one group": (Awq(0), files.awq(-1)),
    "gptq 3": (Gptq(3, 32, symmetric=False), files.gptq(3, 32, symmetric=False)),
    "gptq 8": (Gptq(8, 0), files.gptq(8, -1, symmetric=True)),
    "packed": (PackedInts(4, 32, symmetric=False), files.packed(4, 32, symmetric=False)),
    "int8": (Int8(per_tensor=False, activations=Activations.TOKEN), files.int8()),
    "fp8": (Fp8("channel", Activations.TOKEN), files.fp8("channel")),
    "fp8 blocks": (Fp8("block", Activations.GROUP, (32, 32)), files.fp8("block")),
    "squeezellm": (SqueezeLlm(3), files.squeezellm(3, sparse=False)),
}


@pytest.mark.parametrize("name", SPLIT)
def test_ranks_hold_their_parts(name: str) -> None:
    scheme, quantize = SPLIT[name]
    torch.manual_seed(0)
    gate, up, down = torch.randn(N, K), torch.randn(N, K), torch.randn(N, K)
    matrices = {shard: quantize(weight) for shard, weight in (("gate", gate), ("up", up))}
    stored, expected = quantize(down)
    held: dict[str, list[torch.Tensor]] = {"gate": [], "up": [], "down": []}
    for rank in range(2):
        parallel = TensorParallel(rank, 2)
        methods = SameMethod(method(scheme, stored))
        merged = MergedColumnParallelLinear(
            "up", K, {"gate": N, "up": N}, bias=False, methods=methods, parallel=parallel
        )
        [layout] = load(merged, {shard: tensors for shard, (tensors, _) in matrices.items()})
        for shard, part in zip(("gate", "up"), layout.weight().split(N // 2), strict=True):
            held[shard].append(part)
        row = RowParallelLinear("down", K, N, bias=False, methods=methods, parallel=parallel)
        [layout] = load(row, {"": stored})
        assert not list(row.parameters())
        held["down"].append(layout.weight())
    for shard, (_, weight) in matrices.items():
        torch.testing.assert_close(torch.cat(held[shard]), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(held["down"], 1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("scheme", "quantize"),
    [
        (Gptq(4, 32, desc_act=True), files.gptq(4, 32, symmetric=True, ordered=True)),
        (PackedInts(4, 32, ordered=True), files.packed(4, 32, symmetric=True, ordered=True)),
        (BnbTable(nested=False), files.nf4(nested=False)),
        (SqueezeLlm(4), files.squeezellm(4, sparse=True)),
    ],
    ids=["gptq in order", "packed in order", "nf4", "outliers"],
)
def test_what_inputs_cannot_be_split_of_is_shared_by_outputs_or_whole(
    scheme: Scheme, quantize: Quantize
) -> None:
    stored, expected = quantize(torch.randn(N, K))
    parts = []
    for rank in range(2):
        methods = SameMethod(method(scheme, stored))
        row = RowParallelLinear("down", K, N, bias=False, methods=methods, parallel=TensorParallel(rank, 2))
        [layout] = load(row, {"": stored})
        parts.append(layout.weight())
    if len(parts[0]) == N:
        torch.testing.assert_close(parts[0], parts[1])
        held = parts[0]
    else:
        held = torch.cat(parts)
    torch.testing.assert_close(held, expected, rtol=1e-5, atol=1e-6)


def test_matrices_whose_inputs_are_in_different_orders_are_multiplied_apart() -> None:
    scheme = Gptq(4, 32, desc_act=True)
    expected, tensors = [], {}
    for shard, seed in (("gate", 1), ("up", 2)):
        weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
        quantize = files.gptq(4, 32, symmetric=True, ordered=seed == 1)
        tensors[shard], stands_for = quantize(weight)
        expected.append(stands_for)
    layer = MergedColumnParallelLinear(
        "up",
        K,
        {"gate": N, "up": N},
        bias=True,
        methods=SameMethod(method(scheme, tensors["gate"])),
        parallel=TensorParallel(),
    )
    bias = torch.randn(2 * N)
    layer.bias.data.copy_(bias)
    layouts = load(layer, tensors)
    assert [layout.order is None for layout in layouts] == [False, True]
    x = torch.randn(5, K)
    torch.testing.assert_close(layer(x), x @ torch.cat(expected).T + bias, rtol=1e-4, atol=1e-4)


def test_blocks_begin_anew_in_each_matrix() -> None:
    """After one that ends within a block nothing can be joined."""
    quantize, sizes = files.fp8("block"), {"gate": 64, "up": 48, "more": 32}
    matrices = {name: quantize(torch.randn(size, 80)) for name, size in sizes.items()}
    layer = MergedColumnParallelLinear(
        "up",
        80,
        sizes,
        bias=False,
        methods=SameMethod(method(Fp8("block", Activations.NONE, (32, 32)))),
        parallel=TensorParallel(),
    )
    layouts = load(layer, {name: stored for name, (stored, _) in matrices.items()})
    assert [layout.out_features for layout in layouts] == [112, 32]
    x, weight = torch.randn(3, 80), torch.cat([stands_for for _, stands_for in matrices.values()])
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-4, atol=1e-4)


def test_groups_that_are_not_of_the_size_that_the_file_says_are_refused() -> None:
    stored, _ = files.gptq(4, 32, symmetric=True)(torch.randn(N, K))
    stored["g_idx"][0] = 1
    methods = SameMethod(method(Gptq(4, 32), stored))
    layer = RowParallelLinear("down", K, N, bias=False, methods=methods, parallel=TensorParallel())
    with pytest.raises(ConfigError, match="down: its g_idx does not make groups of 32 inputs each"):
        load(layer, {"": stored})


# Everything that may differ within a model does.
MIXED = {
    **compressed("mixed-precision", {**GROUPS_4}),
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": GROUPS_4, "format": "pack-quantized"},
        "group_1": {"targets": ["re:.*down_proj"], "weights": FP8, "format": "float-quantized"},
        "group_2": {
            "targets": ["model.layers.1.mlp.up_proj"],
            "weights": CHANNEL_8,
            "format": "int-quantized",
        },
    },
    "ignore": ["lm_head", "re:.*v_proj", "model.layers.0.mlp.gate_proj"],
}


def test_schemes_may_differ_between_matrices_even_of_a_fused_layer(tmp_path: Path) -> None:
    others = {
        "down_proj": files.fp8("channel"),
        "layers.1.mlp.up_proj": files.int8(),
        "v_proj": None,
        "layers.0.mlp.gate_proj": None,
    }
    case = Case(MIXED, files.packed(4, 32, symmetric=True))
    quantized, plain = write_pair(tmp_path, case, others=others, attention_bias=True, mlp_bias=True)
    layers = dict(assert_alike(quantized, plain).named_modules())
    assert isinstance(layers["model.layers.0.self_attn.qkv_proj"].method, SeparateProducts)
    assert [type(each) for each in layers["model.layers.1.mlp.down_proj"].layouts] == [Fp8Channels]


def test_modules_that_are_stored_in_full_precision_are_plain_whatever_is_said(tmp_path: Path) -> None:
    case, _ = CASES["gptq 4"]
    quantized, plain = write_pair(tmp_path, case, others={"layers.1.": None, "k_proj": None})
    assert_alike(quantized, plain)


def test_settings_by_module_of_gptqmodel(tmp_path: Path) -> None:
    dynamic = {r"-:.*o_proj": {}, r"+:.*layers\.1\..*down_proj": {"bits": 8, "group_size": 64}}
    described = {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": dynamic}
    case = Case(described, files.gptq(4, 32, symmetric=True), changes={"intermediate_size": 128})
    others = {"o_proj": None, "layers.1.mlp.down_proj": files.gptq(8, 64, symmetric=True)}
    assert_alike(*write_pair(tmp_path, case, others=others))


def test_a_description_may_have_a_file_of_its_own(tmp_path: Path) -> None:
    case, _ = CASES["gptq 4"]
    quantized, plain = write_pair(tmp_path, case)
    config = json.loads((quantized / "config.json").read_text())
    described = config.pop("quantization_config")
    del described["quant_method"]
    (quantized / "config.json").write_text(json.dumps(config))
    (quantized / "quantize_config.json").write_text(json.dumps(described))
    assert_alike(quantized, plain)


def _end_after(tensors: dict[str, torch.Tensor]) -> None:
    tensors["rows"][-1] += 1


def _lie_outside(tensors: dict[str, torch.Tensor]) -> None:
    tensors["cols"][0] = 10**6


def _begin_outside(tensors: dict[str, torch.Tensor]) -> None:
    tensors["full_row_indices"][0] = -1


@pytest.mark.parametrize("damage", [_end_after, _lie_outside, _begin_outside])
def test_damaged_outliers_are_refused(damage: Callable[[dict[str, torch.Tensor]], None]) -> None:
    stored, _ = files.squeezellm(4, sparse=True)(torch.randn(N, K))
    damage(stored)
    methods = SameMethod(method(SqueezeLlm(4), stored))
    layer = RowParallelLinear("down", K, N, bias=False, methods=methods, parallel=TensorParallel())
    with pytest.raises(ConfigError, match=r"^down: (rows, cols and vals|full_rows) are no "):
        load(layer, {"": stored})


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("weight.nested_absmax", torch.ones(0), "nested_absmax has 0 scales for 128 blocks"),
        ("weight.quant_state.bitsandbytes__nf4", b"{", "quant_state.bitsandbytes__nf4 is not JSON"),
        ("weight.quant_state.bitsandbytes__nf4", b"[]", "bitsandbytes__nf4 is no JSON object"),
        ("weight.quant_state.bitsandbytes__nf4", b'{"blocksize": 128}', "blocksize is 128; supported is 64"),
    ],
)
def test_damaged_states_of_bitsandbytes_are_refused(tensor: str, value: Any, message: str) -> None:
    stored, _ = files.nf4(nested=True)(torch.randn(N, K))
    stored[tensor] = torch.tensor(list(value), dtype=torch.uint8) if isinstance(value, bytes) else value
    methods = SameMethod(method(BnbTable(nested=True), stored))
    layer = RowParallelLinear("down", K, N, bias=False, methods=methods, parallel=TensorParallel())
    with pytest.raises(ConfigError, match=f"^down: .*{message}"):
        load(layer, {"": stored})


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_what_lies_beside_the_model_is_ignored_if_it_carries_nothing(value: float, tmp_path: Path) -> None:
    """AutoGPTQ gives every matrix a bias, and calibrated checkpoints have scales for an 8-bit KV cache."""
    quantized, plain = write_pair(tmp_path, CASES["gptq 4"][0])
    tensors = load_file(quantized / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bias"] = torch.full((96,), value, dtype=torch.float16)
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    save_file(tensors, quantized / "model.safetensors")
    if value == 0:
        assert_alike(quantized, plain)
        return
    with pytest.raises(
        ConfigError, match=r"'model\.layers\.0\.mlp\.up_proj\.bias' is not part of this model"
    ):
        runner(quantized)


def test_matrices_that_a_checkpoint_fuses_are_taken_apart(tmp_path: Path) -> None:
    """Phi-3's query_key_value and gate_up, packed along the outputs that they are fused along."""
    quantized, plain = write_pair(tmp_path, Case(AWQ, files.awq(32)))
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for directory, parts in ((quantized, ("qweight", "qzeros", "scales")), (plain, ("weight",))):
        tensors = load_file(directory / "model.safetensors")
        for layer in (f"model.layers.{index}" for index in range(2)):
            for name, own in fused.items():
                parent = f"{layer}.{'self_attn' if name == 'qkv_proj' else 'mlp'}"
                for part in parts:
                    pieces = [tensors.pop(f"{parent}.{matrix}.{part}") for matrix in own]
                    tensors[f"{parent}.{name}.{part}"] = torch.cat(pieces, 0 if part == "weight" else 1)
        save_file(tensors, directory / "model.safetensors")
        text = (directory / "config.json").read_text()
        (directory / "config.json").write_text(text.replace("LlamaForCausalLM", "Phi3ForCausalLM"))
    assert_alike(quantized, plain)


@pytest.mark.parametrize(
    "name", ["awq", "gptq 3, asymmetric, in order", "nf4, double", "squeezellm 3, sparse"]
)
def test_random_weights_need_a_description_alone(name: str, tmp_path: Path) -> None:
    case, layout = CASES[name]
    config = {**TINY, **CONFIG, "quantization_config": dict(case.described)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    served = runner(tmp_path, load_format="dummy")
    assert [type(each) for each in base.layouts_of(served.model)] == [layout] * 8
    for told in logprobs_of(served):
        assert all(torch.tensor(entry.top_logprobs).isfinite().all() for entry in told)


MIXTRAL = {
    **CONFIG,
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
MIXTURES = {
    "gptq": Case({"quant_method": "gptq", "bits": 4, "group_size": 32}, files.gptq(4, 32, symmetric=False)),
    "fp8": Case(compressed("float-quantized", {**FP8, "strategy": "tensor"}), files.fp8("tensor")),
}


def mixtral() -> dict[str, torch.Tensor]:
    weights = tensors({**TINY, **CONFIG})
    for layer in (f"model.layers.{index}" for index in range(TINY["num_hidden_layers"])):
        for name in ("gate", "up", "down"):
            weights.pop(f"{layer}.mlp.{name}_proj.weight")
        moe = f"{layer}.block_sparse_moe"
        weights[f"{moe}.gate.weight"] = torch.randn(4, 64) / 8
        for expert in range(4):
            for name, shape in (("w1", (96, 64)), ("w2", (64, 96)), ("w3", (96, 64))):
                weights[f"{moe}.experts.{expert}.{name}.weight"] = torch.randn(shape) / shape[1] ** 0.5
    return weights


@pytest.mark.parametrize("name", ["gptq", pytest.param("fp8", marks=pytest.mark.slow)])
def test_experts_are_quantized_each_matrix_as_it_is_stored(name: str, tmp_path: Path) -> None:
    others = {"experts.2.w3": None, "layers.1.block_sparse_moe.experts.0": None}
    quantized, plain = write_both(tmp_path, MIXTURES[name], mixtral(), MIXTRAL, others)
    assert_alike(quantized, plain)
    for told in logprobs(quantized, load_format="dummy"):
        assert all(torch.tensor(entry.top_logprobs).isfinite().all() for entry in told)
    for told in logprobs(plain, quantization="int8"):
        assert all(torch.tensor(entry.top_logprobs).isfinite().all() for entry in told)


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_plain_weights_are_quantized_as_they_are_loaded(kind: str, tmp_path: Path) -> None:
    directory = write_model(tmp_path, **CONFIG)
    weights = load_file(directory / "model.safetensors")
    model = runner(directory, quantization=kind).model
    layer = model.model.layers[1].self_attn.qkv_proj
    [layout] = layer.layouts
    whole = torch.cat([weights[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"])
    expected = files.MADE_AT_LOAD[kind](whole)
    torch.testing.assert_close(layout.weight(), expected, rtol=1e-5, atol=1e-6)
    assert not any("layers" in name and "proj" in name for name, _ in model.named_parameters())
    assert not hasattr(model.lm_head, "layouts")
    for told in logprobs(directory, quantization=kind, load_format="dummy"):
        assert all(torch.tensor(entry.top_logprobs).isfinite().all() for entry in told)


def test_weights_quantized_at_load_are_another_model(tmp_path: Path) -> None:
    directory = write_model(tmp_path)
    prints = {fingerprint(directory, "auto", 0, quantization) for quantization in ("auto", "int8", "fp8")}
    assert len(prints) == 3


def test_words_hold_neighbours_in_halves_of_16_bits() -> None:
    values = torch.randint(0, 16, (3, 64), dtype=torch.uint8)
    words = pack_words(values, 4)
    assert torch.equal(unpack_words(words, 4), values.int())
    for pair in range(4):
        halves = (words[1, 2].item() >> (4 * pair)) & 0x000F000F
        assert [halves & 0xFFFF, halves >> 16] == values[1, 16 + 2 * pair : 18 + 2 * pair].tolist()
    values = values & 3
    words = pack_words(values, 2)
    assert torch.equal(unpack_words(words, 2), values.int())
    for pair in range(8):
        halves = (words[2, 1].item() >> (2 * pair)) & 0x00030003
        assert [halves & 0xFFFF, halves >> 16] == values[2, 16 + 2 * pair : 18 + 2 * pair].tolist()


TILED = ("awq", "squeezellm 3, sparse", "fp8 static", "fp8 blocks", "int8 static with a zero point")


@pytest.mark.parametrize("name", TILED)
def test_products_are_the_same_in_tiles(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = CASES[name][0] if name in CASES else INPUT_CASES[name][0]
    quantized, _ = write_pair(tmp_path, case)
    [layout] = runner(quantized).model.model.layers[0].mlp.gate_up_proj.layouts
    x, bias = torch.randn(3, 64), torch.randn(192)
    whole = layout.multiply(x, bias)
    monkeypatch.setattr(base, "TILE_ELEMENTS", 64 * 40)
    assert len(list(layout.tiles())) == 5
    torch.testing.assert_close(layout.multiply(x, bias), whole, rtol=1e-5, atol=1e-5)
    assert layout.multiply(x.bfloat16(), bias.bfloat16()).dtype == torch.bfloat16


def test_a_device_may_have_products_of_its_own() -> None:
    layout = quantized(torch.randn(8, 32), "int8", torch.float32)
    x = torch.randn(2, 32)
    own = LayoutProducts({Int8Groups: lambda layout, x, bias: x.new_full((2, 8), 7.0)})
    assert own.multiply(layout, x, None).eq(7).all()
    other = quantized(torch.randn(8, 32), "fp8", torch.float32)
    assert torch.equal(own.multiply(other, x, None), other.multiply(x, None))


def test_memory_holds_no_more_than_the_quantized_weights() -> None:
    weight = torch.randn(256, 256)
    four, eight = (quantized(weight, kind, torch.bfloat16) for kind in ("int4", "int8"))
    assert isinstance(four, PackedGroups)
    assert four.num_bytes == 256 * 256 // 2 + 2 * 256 * (2 + 1)
    assert eight.num_bytes == 256 * 256 + 256 * 4
    table = TableWeights(
        words=four.words, table=torch.zeros(256, 16), scales=None, group_size=256, outliers=None
    )
    assert table.num_bytes == 256 * 256 // 2 + 256 * 16 * 4
