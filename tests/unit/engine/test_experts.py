"""Layers of experts: how they are loaded from every layout, split over ranks, and computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.cpu.attention import TorchAttentionBackend
from engine.cpu.expert_method import PackedCpuExperts
from engine.cpu.linear_method import PackedCpuMethod
from engine.cpu.ops import TorchLayerOps
from engine.kernels.experts.naive import naive_dequantize, naive_experts
from engine.layers.expert_config import ExpertTensors, GatedActivation
from engine.layers.experts import ExpertMethod, Experts
from engine.layers.linear_method import DenseMethod, SameMethod
from engine.layers.looped_experts import DenseExperts
from engine.layers.mxfp4 import Mxfp4Experts, dequantize
from engine.layers.parallel import SplitError, TensorParallel
from engine.layers.weights import ShardError
from engine.loader.checkpoint import open_checkpoint
from engine.loader.dummy import load_dummy
from engine.loader.load import create_model
from engine.loader.weights import load_weights
from engine.models.base import CausalLM, ModelContext
from engine.models.families import load_model_config, parse_model_config
from pagewire.base.errors import ConfigError
from tests.unit.engine import tiny_experts, tiny_model

CPU = torch.device("cpu")
E, H, INNER = 3, 32, 64
CLAMPED = GatedActivation("clamped", alpha=1.702, limit=1.0)
METHODS: dict[str, ExpertMethod] = {"": DenseExperts(), "mxfp4": Mxfp4Experts()}


def make_experts(
    tensors: ExpertTensors,
    *,
    method: ExpertMethod | None = None,
    parallel: TensorParallel | None = None,
    activation: GatedActivation = CLAMPED,
) -> Experts:
    return Experts(
        "mlp.experts",
        num_experts=E,
        hidden_size=H,
        intermediate_size=INNER,
        activation=activation,
        bias=True,
        tensors=tensors,
        method=method or DenseExperts(),
        ops=TorchLayerOps(CPU),
        parallel=parallel or TensorParallel(),
    )


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"gate": (E, INNER, H), "up": (E, INNER, H), "down": (E, H, INNER)}
    values = {name: torch.randn(shape) / shape[2] ** 0.5 for name, shape in shapes.items()}
    return values | {f"{name}_bias": torch.randn(shape[:2]) for name, shape in shapes.items()}


def load_separate(experts: Experts, weights: dict[str, torch.Tensor]) -> None:
    for module in (experts.gate_up_proj, experts.down_proj):
        for shard in module.checkpoint_shards:
            expert, _, matrix = shard.partition(".")
            module.load_parameter("weight", weights[matrix][int(expert)], shard)
            module.load_parameter("bias", weights[f"{matrix}_bias"][int(expert)], shard)
        module.finish_loading()


def stacked(weights: dict[str, torch.Tensor], tensors: ExpertTensors) -> dict[str, torch.Tensor]:
    """gate_up and down as such checkpoints have them."""

    def fuse(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        fused = torch.stack((gate, up), 2) if tensors.interleaved else torch.stack((gate, up), 1)
        return fused.flatten(1, 2)

    def turn(values: torch.Tensor) -> torch.Tensor:
        return values.transpose(1, 2) if tensors.transposed else values

    return {
        "gate_up": turn(fuse(weights["gate"], weights["up"])),
        "gate_up_bias": fuse(weights["gate_bias"], weights["up_bias"]),
        "down": turn(weights["down"]),
        "down_bias": weights["down_bias"],
    }


def load_stacked(experts: Experts, tensors: dict[str, torch.Tensor]) -> None:
    for module, name in ((experts.gate_up_proj, "gate_up"), (experts.down_proj, "down")):
        module.load_parameter("weight", tensors[name], None)
        module.load_parameter("bias", tensors[f"{name}_bias"], None)
        module.finish_loading()


def expected(weights: dict[str, torch.Tensor], x: torch.Tensor, routing: Any) -> torch.Tensor:
    made = naive_experts(
        x,
        routing.experts,
        routing.weights,
        torch.cat((weights["gate"], weights["up"]), 1),
        weights["down"],
        gate_up_bias=torch.cat((weights["gate_bias"], weights["up_bias"]), 1),
        down_bias=weights["down_bias"],
        kind="clamped",
        alpha=CLAMPED.alpha,
        limit=CLAMPED.limit,
    )
    return made.float()


def some_tokens() -> tuple[torch.Tensor, Any]:
    """Tokens, and a routing that gives the last expert none."""
    x, logits = torch.randn(5, H), torch.randn(5, E)
    logits[:, E - 1] = -9.0
    return x, TorchLayerOps(CPU).route(logits, 2, renormalise=True)


@pytest.mark.parametrize(
    "tensors",
    [
        ExpertTensors(stacked=True),
        ExpertTensors(stacked=True, interleaved=True),
        ExpertTensors(stacked=True, interleaved=True, transposed=True),
    ],
    ids=str,
)
def test_experts_are_the_same_from_every_layout(
    weights: dict[str, torch.Tensor], tensors: ExpertTensors
) -> None:
    separate, together = make_experts(ExpertTensors()), make_experts(tensors)
    load_separate(separate, weights)
    load_stacked(together, stacked(weights, tensors))
    assert together.gate_up_proj.checkpoint_shards == ()
    ours, theirs = separate.state_dict(), together.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    x, routing = some_tokens()
    torch.testing.assert_close(separate(x, routing), expected(weights, x, routing))


@pytest.mark.skipif(not PackedCpuMethod.is_available(torch.float32), reason="this torch packs no weights")
def test_packed_experts_compute_the_same(weights: dict[str, torch.Tensor]) -> None:
    experts = make_experts(ExpertTensors(), method=PackedCpuExperts())
    load_separate(experts, weights)
    x, routing = some_tokens()
    torch.testing.assert_close(experts(x, routing), expected(weights, x, routing))
    assert [name for name, _ in experts.named_parameters()] == ["gate_up_proj.bias", "down_proj.bias"]


@pytest.mark.parametrize("is_stacked", [False, True])
def test_what_ranks_make_of_their_channels_adds_up_to_the_whole(
    weights: dict[str, torch.Tensor], is_stacked: bool
) -> None:
    tensors = ExpertTensors(stacked=is_stacked, interleaved=is_stacked)
    x, routing = some_tokens()
    parts = []
    for rank in range(2):
        experts = make_experts(tensors, parallel=TensorParallel(rank, 2))
        if is_stacked:
            load_stacked(experts, stacked(weights, tensors))
        else:
            load_separate(experts, weights)
        assert experts.gate_up_proj.get_parameter("weight").shape == (E, INNER, H)
        parts.append(experts.method.apply(experts, x, routing))
    torch.testing.assert_close(parts[0] + parts[1], expected(weights, x, routing))


def test_mxfp4_experts_are_split_and_compute_what_they_stand_for() -> None:
    tensors = ExpertTensors(stacked=True, interleaved=True)
    shapes = {"gate_up": (E, 2 * INNER, H // 32), "down": (E, H, INNER // 32)}
    blocks = {name: torch.randint(0, 256, (*shape, 16), dtype=torch.uint8) for name, shape in shapes.items()}
    scales = {name: torch.randint(120, 125, shape, dtype=torch.uint8) for name, shape in shapes.items()}
    biases = {name: torch.randn(shape[:2]) for name, shape in shapes.items()}
    values = {name: naive_dequantize(blocks[name].flatten(2), scales[name]) for name in shapes}
    x, routing = some_tokens()
    gates = {"gate": 0, "up": 1}
    whole = {name: values["gate_up"][:, first::2] for name, first in gates.items()}
    whole |= {f"{name}_bias": biases["gate_up"][:, first::2] for name, first in gates.items()}
    whole |= {"down": values["down"], "down_bias": biases["down"]}
    for size in (1, 2):
        total = torch.zeros(5, H)
        for rank in range(size):
            experts = make_experts(tensors, method=Mxfp4Experts(), parallel=TensorParallel(rank, size))
            for module, name in ((experts.gate_up_proj, "gate_up"), (experts.down_proj, "down")):
                module.load_parameter("blocks", blocks[name], None)
                module.load_parameter("scales", scales[name], None)
                module.load_parameter("bias", biases[name], None)
            total += experts.method.apply(experts, x, routing)
        torch.testing.assert_close(total, expected(whole, x, routing))


def test_ranks_cannot_cut_through_an_mxfp4_group() -> None:
    with pytest.raises(SplitError, match="keeps 32 features together"):
        make_experts(ExpertTensors(stacked=True), method=Mxfp4Experts(), parallel=TensorParallel(0, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_codes_and_scales_of_mxfp4_are_dequantized_exactly(dtype: torch.dtype) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scales = torch.tensor([1, 60, *range(116, 130)], dtype=torch.uint8).view(16, 1)
    out = dequantize(blocks, scales, dtype)
    assert out.dtype == dtype
    assert torch.equal(out.double(), naive_dequantize(blocks, scales))
    assert out[2].tolist()[:4] == [0.0, 2**-11, 2**-12, 2**-11]  # bytes 0x20 and 0x21, times 2 ** -11


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("weight", (E, 2 * INNER, H + 1), "is needed"),
        ("weight", (E + 1, 2 * INNER, H), "is needed"),
        ("weight", (2 * INNER, H), "3 dimensions are needed"),
        ("bias", (E, 2 * INNER - 1), "it holds 2 matrices of the same size"),
    ],
)
def test_a_stacked_tensor_of_another_shape_is_refused(
    name: str, shape: tuple[int, ...], message: str
) -> None:
    experts = make_experts(ExpertTensors(stacked=True))
    with pytest.raises(ShardError, match=message):
        experts.gate_up_proj.load_parameter(name, torch.zeros(shape), None)


def load(directory: Path) -> CausalLM:
    model = make_model(directory)
    load_weights(model, open_checkpoint(directory), CPU)
    return model


def make_model(directory: Path) -> CausalLM:
    context = ModelContext(
        load_model_config(directory),
        64,
        TorchAttentionBackend(CPU, torch.float32),
        TorchLayerOps(CPU),
        SameMethod(DenseMethod()),
        TensorParallel(),
        METHODS,
    )
    return create_model(context, CPU, torch.float32)


QWEN = {
    **tiny_model.CONFIG,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "head_dim": 8,
}


def qwen_tensors(*, is_stacked: bool) -> dict[str, torch.Tensor]:
    tensors = {name: t for name, t in tiny_model.tensors(QWEN).items() if ".mlp." not in name}
    for layer in (f"model.layers.{index}" for index in range(QWEN["num_hidden_layers"])):
        for norm in ("q_norm", "k_norm"):
            tensors[f"{layer}.self_attn.{norm}.weight"] = torch.ones(8)
        tensors[f"{layer}.mlp.gate.weight"] = torch.randn(3, 32)
        gate_up, down = torch.randn(3, 32, 32), torch.randn(3, 32, 16)
        experts = f"{layer}.mlp.experts"
        if is_stacked:
            tensors |= {f"{experts}.gate_up_proj": gate_up, f"{experts}.down_proj": down}
            continue
        for expert in range(3):
            gate, up = gate_up[expert].chunk(2)
            for name, matrix in (("gate", gate), ("up", up), ("down", down[expert])):
                tensors[f"{experts}.{expert}.{name}_proj.weight"] = matrix.clone()
    return tensors


def write(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    tiny_experts._write(directory, config, tensors)
    return directory


def test_one_tensor_for_all_experts_is_as_good_as_one_for_each(tmp_path: Path) -> None:
    models = []
    for is_stacked in (False, True):
        torch.manual_seed(1)
        tensors = qwen_tensors(is_stacked=is_stacked)
        models.append(load(write(tmp_path / str(is_stacked), QWEN, tensors)).state_dict())
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_an_expert_that_is_missing_or_there_twice_is_named(tmp_path: Path) -> None:
    tensors, name = qwen_tensors(is_stacked=False), "model.layers.1.mlp.experts.2.up_proj.weight"
    without = {key: tensor for key, tensor in tensors.items() if key != name}
    with pytest.raises(ConfigError, match=f"lacks 1 tensors of the model: {name}"):
        load(write(tmp_path / "missing", QWEN, without))
    twice = tensors | {"model.layers.1.mlp.experts.down_proj": torch.zeros(3, 32, 16)}
    with pytest.raises(ConfigError, match=r"experts\.0\.down_proj\.weight' is in"):
        load(write(tmp_path / "twice", QWEN, twice))


def test_random_mxfp4_weights_are_finite(tmp_path: Path) -> None:
    tiny_experts.write_gpt_oss(tmp_path / "mxfp4", tmp_path / "plain")
    model = make_model(tmp_path / "mxfp4")
    load_dummy(model, 0)
    scales = [tensor for name, tensor in model.named_parameters() if name.endswith("scales")]
    assert len(scales) == 4
    assert all(116 < int(tensor.min()) <= int(tensor.max()) < 119 for tensor in scales)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": None}, "num_experts is None; it must be a positive integer"),
        ({"num_experts_per_tok": 4}, r"num_experts_per_tok is 4; it must be at most the number of experts"),
        ({"mlp_only_layers": [0, "1"]}, "mlp_only_layers is .* a list of numbers of layers"),
        ({"use_sliding_window": True}, "use_sliding_window is True; it must be False"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantized as 'mxfp4'; supported are"),
        (
            {
                "architectures": ["GptOssForCausalLM"],
                "quantization_config": {"quant_method": "gptq", "bits": 4},
            },
            "experts quantized as 'gptq' are not supported",
        ),
        (
            {"architectures": ["GptOssForCausalLM"], "quantization_config": {"quant_method": "mxfp4"}},
            "intermediate_size is 48; it must be a multiple of 32 for MXFP4 weights",
        ),
    ],
)
def test_a_configuration_that_is_no_mixture_of_experts_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_model_config({**QWEN, **changes}, {}, source="config.json")


def test_only_the_layers_that_the_file_says_have_experts() -> None:
    values = {**QWEN, "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    config = parse_model_config(json.loads(json.dumps(values)), {}, source="config.json")
    assert [layer.experts is not None for layer in config.layers] == [False, True, False, False, False, True]
