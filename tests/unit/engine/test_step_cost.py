"""What a step costs the device by the model's shapes, which decides for which steps there are graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.cpu.attention import TorchAttentionBackend
from engine.cpu.ops import TorchLayerOps
from engine.cuda.step_cost import expected_distinct, step_cost
from engine.layers.linear_method import DenseMethod, SameMethod
from engine.layers.looped_experts import DenseExperts
from engine.layers.mxfp4 import Mxfp4Experts
from engine.layers.parallel import TensorParallel
from engine.loader.load import create_model
from engine.models.base import CausalLM, ModelContext
from engine.models.families import parse_model_config
from tests.unit.engine import tiny_experts, tiny_model
from tests.unit.engine.test_loading import runner

MIXTRAL = {
    **tiny_model.CONFIG,
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
LAYERS, HIDDEN, INNER = MIXTRAL["num_hidden_layers"], MIXTRAL["hidden_size"], MIXTRAL["intermediate_size"]
EXPERT = 3 * HIDDEN * INNER


def model_of(config: dict[str, Any]) -> CausalLM:
    """In bfloat16, without memory."""
    device, dtype = torch.device("meta"), torch.bfloat16
    context = ModelContext(
        parse_model_config(config, {}, source="config.json"),
        64,
        TorchAttentionBackend(device, dtype),
        TorchLayerOps(device),
        SameMethod(DenseMethod()),
        TensorParallel(),
        {"": DenseExperts(), "mxfp4": Mxfp4Experts()},
    )
    return create_model(context, device, dtype)


def num_weights(model: CausalLM) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_dense_model_uses_and_reads_all_weights() -> None:
    model = model_of(tiny_model.CONFIG)
    cost = step_cost(model, 144)
    assert cost.operations == 2 * 144 * num_weights(model)
    assert cost.num_bytes == 2 * num_weights(model)


@pytest.mark.parametrize(("num_tokens", "used"), [(1, 2.0), (2, 3.5), (1000, 8.0)])
def test_a_token_uses_its_experts_and_a_step_reads_those_that_any_of_its_tokens_uses(
    num_tokens: int, used: float
) -> None:
    model = model_of(MIXTRAL)
    common = num_weights(model) - LAYERS * 8 * EXPERT
    cost = step_cost(model, num_tokens)
    assert cost.operations == 2 * num_tokens * (common + LAYERS * 2 * EXPERT)
    assert cost.num_bytes == pytest.approx(2 * (common + LAYERS * used * EXPERT))


def test_packed_experts_are_read_packed_and_computed_in_full() -> None:
    packed, plain = (
        step_cost(model_of({**tiny_experts.CONFIG, **changes}), 64)
        for changes in ({"quantization_config": tiny_experts.MXFP4}, {})
    )
    assert packed.operations == plain.operations
    num_experts = tiny_experts.NUM_LAYERS * tiny_experts.NUM_EXPERTS
    weights = 3 * num_experts * tiny_experts.HIDDEN * tiny_experts.INNER
    # 4 bits and a 32nd of a byte for each, instead of two bytes.
    assert plain.num_bytes - packed.num_bytes == pytest.approx(weights * (2 - 1 / 2 - 1 / 32))


def test_quantized_layers_are_read_packed_and_computed_in_full(tmp_path: Path) -> None:
    directory = tiny_model.write_model(tmp_path, hidden_size=128, intermediate_size=128, head_dim=32)
    # A CPU keeps plain weights where no parameter has them.
    rest, all_of_it = (step_cost(runner(directory, quantization=kind).model, 1) for kind in ("auto", "int4"))
    weights = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 128)
    assert all_of_it.operations - rest.operations == 2 * weights
    # Half a byte each, and for 128 a scale and a zero point.
    assert all_of_it.num_bytes - rest.num_bytes == weights * (1 / 2 + (4 + 1) / 128)


def test_few_tokens_wait_for_memory_and_many_for_products() -> None:
    model = model_of(MIXTRAL)
    few, many = step_cost(model, 1), step_cost(model, 4096)
    assert few.seconds == few.num_bytes / 4.3e12
    assert many.seconds == many.operations / 6e14


def test_distinct_experts_are_as_many_as_draws_find() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(400, 20, 16, generator=generator).topk(3, dim=-1).indices
    found = sum(len(each.unique()) for each in draws) / len(draws)
    assert expected_distinct(16, 3, 20) == pytest.approx(found, rel=0.01)
