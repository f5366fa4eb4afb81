"""Layers: their mathematics, and that the parts of tensor-parallel ranks make up the whole."""

from __future__ import annotations

import pytest
import torch

from engine.attention.interface import RotaryTable
from engine.cpu.attention import TorchAttentionBackend, rotate
from engine.cpu.linear_method import PackedCpuMethod
from engine.cpu.ops import TorchLayerOps
from engine.kernels.activate_and_mul.naive import naive_activate_and_mul
from engine.layers.embedding import VocabParallelEmbedding
from engine.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from engine.layers.linear_method import DenseMethod, LinearMethods, SameMethod
from engine.layers.norm import RMSNorm
from engine.layers.parallel import TensorParallel
from engine.layers.rotary import rotary_table
from engine.layers.weights import ShardError

OPS = TorchLayerOps(torch.device("cpu"))
DENSE = SameMethod(DenseMethod())
RANKS = [TensorParallel(rank, 2) for rank in range(2)]


@pytest.fixture(autouse=True)
def _without_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks live side by side in this process; the tests add up their parts themselves."""
    monkeypatch.setattr(TensorParallel, "all_reduce", lambda self, partial: partial)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 5, 64])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_weights_give_the_plain_product(bias: bool, num_tokens: int, dtype: torch.dtype) -> None:
    if not PackedCpuMethod.is_available(dtype):
        pytest.skip("this build of torch, or this processor, has no such product")
    torch.manual_seed(0)
    weight, offset, x = torch.randn(96, 48), torch.randn(48), torch.randn(num_tokens, 96)
    outputs = []
    for method in (DenseMethod(), PackedCpuMethod()):
        layer = RowParallelLinear(
            "o", 96, 48, bias=bias, methods=SameMethod(method), parallel=TensorParallel()
        )
        layer.load_parameter("weight", weight.T, None)
        if bias:
            layer.load_parameter("bias", offset, None)
        layer.to(dtype).finish_loading()
        outputs.append(layer(x.to(dtype)))
    tolerance = 1e-5 if dtype is torch.float32 else 5e-2
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance * 10)


def test_row_parallel_parts_add_up_to_the_whole() -> None:
    weight, bias, x = torch.randn(6, 8), torch.randn(6), torch.randn(3, 8)
    total = torch.zeros(3, 6)
    for parallel in RANKS:
        layer = RowParallelLinear("o", 8, 6, bias=True, methods=DENSE, parallel=parallel)
        layer.load_parameter("weight", weight, None)
        layer.load_parameter("bias", bias, None)
        total += layer(x[:, 4 * parallel.rank : 4 * parallel.rank + 4])
    torch.testing.assert_close(total, x @ weight.T + bias)


def test_merged_columns_hold_each_ranks_part_of_every_matrix() -> None:
    gate, up, x = torch.randn(4, 5), torch.randn(6, 5), torch.randn(2, 5)
    parts = []
    for parallel in RANKS:
        layer = MergedColumnParallelLinear(
            "gate_up", 5, {"gate": 4, "up": 6}, bias=False, methods=DENSE, parallel=parallel
        )
        layer.load_parameter("weight", gate, "gate")
        layer.load_parameter("weight", up, "up")
        parts.append(layer(x).split([2, 3], dim=-1))
    torch.testing.assert_close(torch.cat([part[0] for part in parts], dim=-1), x @ gate.T)
    torch.testing.assert_close(torch.cat([part[1] for part in parts], dim=-1), x @ up.T)


def make_qkv(num_kv_heads: int, parallel: TensorParallel, methods: LinearMethods) -> QKVParallelLinear:
    return QKVParallelLinear(
        "qkv",
        8,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        head_dim=2,
        bias=False,
        methods=methods,
        parallel=parallel,
    )


def test_ranks_split_query_and_key_value_heads() -> None:
    q, k, v, x = torch.randn(8, 8), torch.randn(4, 8), torch.randn(4, 8), torch.randn(3, 8)
    for parallel in RANKS:
        layer = make_qkv(2, parallel, DENSE)
        for name, weight in (("q", q), ("k", k), ("v", v)):
            layer.load_parameter("weight", weight, name)
        heads, kv = (
            slice(4 * parallel.rank, 4 * parallel.rank + 4),
            slice(2 * parallel.rank, 2 * parallel.rank + 2),
        )
        expected = torch.cat([x @ q[heads].T, x @ k[kv].T, x @ v[kv].T], dim=-1)
        torch.testing.assert_close(layer(x), expected)


def test_ranks_beyond_the_key_value_heads_share_one() -> None:
    q, k, x = torch.randn(8, 8), torch.randn(2, 8), torch.randn(3, 8)
    for parallel in RANKS:
        layer = make_qkv(1, parallel, DENSE)
        for name, weight in (("q", q), ("k", k), ("v", k)):
            layer.load_parameter("weight", weight, name)
        assert (layer.num_heads, layer.num_kv_heads) == (2, 1)
        torch.testing.assert_close(layer(x)[:, 4:6], x @ k.T)


def test_fewer_features_than_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="in_features is 1, which 2 tensor-parallel ranks"):
        RowParallelLinear("o", 1, 6, bias=False, methods=DENSE, parallel=RANKS[0])


def test_a_tensor_of_another_shape_is_refused() -> None:
    layer = make_qkv(2, TensorParallel(), DENSE)
    with pytest.raises(ShardError, match=r"has shape \[6, 8\]; 4 is needed in dimension 0"):
        layer.load_parameter("weight", torch.zeros(6, 8), "k")


def test_embedding_parts_add_up_to_the_whole() -> None:
    weight, token_ids = torch.randn(10, 4), torch.tensor([0, 9, 4, 5])
    total = torch.zeros(4, 4)
    for parallel in RANKS:
        layer = VocabParallelEmbedding(10, 4, ops=OPS, parallel=parallel)
        layer.load_parameter("weight", weight, None)
        total += layer(token_ids)
    torch.testing.assert_close(total, weight[token_ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_adds_the_residual_and_normalises(dtype: torch.dtype) -> None:
    norm = RMSNorm(32, 1e-5, OPS)
    norm.load_parameter("weight", torch.randn(32), None)
    norm.weight.data = norm.weight.data.to(dtype)
    x, residual = torch.randn(4, 32).to(dtype), torch.randn(4, 32).to(dtype)
    total = x + residual
    expected = torch.nn.functional.rms_norm(total.float(), (32,), norm.weight.float(), 1e-5).to(dtype)
    output, new_residual = norm(x, residual)
    torch.testing.assert_close(new_residual, total)
    torch.testing.assert_close(output, expected)


def test_rms_norm_of_zeros_is_zero() -> None:
    norm = RMSNorm(8, 1e-5, OPS)
    norm.load_parameter("weight", torch.ones(8), None)
    assert torch.equal(norm(torch.zeros(1, 8), None)[0], torch.zeros(1, 8))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_rotary_turns_each_pair_by_its_angle(rotary_dim: int, interleaved: bool) -> None:
    table = RotaryTable(rotary_table(rotary_dim, 100, 10000.0, None), interleaved)
    backend = TorchAttentionBackend(torch.device("cpu"), torch.float32)
    heads, positions = torch.randn(3, 2, 8), torch.tensor([0, 1, 77])
    rotated = rotate(heads, backend.rotation(table, positions))
    for token, position in enumerate(positions.tolist()):
        for pair in range(rotary_dim // 2):
            angle = torch.tensor(position * 10000.0 ** (-2 * pair / rotary_dim))
            first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + rotary_dim // 2)
            as_complex = torch.complex(heads[token, :, first], heads[token, :, second])
            turned = as_complex * torch.polar(torch.tensor(1.0), angle)
            torch.testing.assert_close(rotated[token, :, first], turned.real, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(rotated[token, :, second], turned.imag, rtol=1e-4, atol=1e-5)
    assert torch.equal(rotated[..., rotary_dim:], heads[..., rotary_dim:])


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_a_gated_activation_takes_the_gate_first(activation: str) -> None:
    gate_up = torch.randn(3, 8)
    expected = naive_activate_and_mul(gate_up, activation)
    torch.testing.assert_close(OPS.activate_and_mul(gate_up, activation), expected)
