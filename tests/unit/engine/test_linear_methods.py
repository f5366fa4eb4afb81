"""Number formats of linear layers: how their parameters load and split, and how layers get theirs by name.

All numbers are small integers times powers of two, so that every sum is exact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.cpu.platform import CpuPlatform
from engine.layers.embedding import ParallelLMHead
from engine.layers.linear import (
    LinearLayer,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    SeparateProducts,
)
from engine.layers.linear_method import DenseMethod, LinearMethod, LinearMethods, LinearShape, SameMethod
from engine.layers.linear_weight import FeatureDim, LinearWeight
from engine.layers.parallel import FeatureRange, SplitError, TensorParallel
from engine.layers.weights import ShardError
from engine.models.families import checkpoint_names
from engine.quant.excluded import ExcludedModules
from pagewire.base.errors import ConfigError
from tests.unit.engine.packed_weights import GROUP, BlockScaled, PackedInt4, pack, unpack
from tests.unit.engine.test_loading import runner, tokens
from tests.unit.engine.tiny_model import CONFIG, tensors, write_model

IN, OUT = 64, 48
WORLDS = [[TensorParallel(rank, size) for rank in range(size)] for size in (1, 2)]
FORMATS = [PackedInt4(), PackedInt4(along_output=True), BlockScaled()]
IDS = ["packed along input", "packed along output", "block scales"]

by_format = pytest.mark.parametrize("method", FORMATS, ids=IDS)
by_ranks = pytest.mark.parametrize("ranks", WORLDS, ids=["1 rank", "2 ranks"])


@pytest.fixture(autouse=True)
def _without_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks live side by side in this process; the tests put their parts together themselves."""
    monkeypatch.setattr(TensorParallel, "all_reduce", lambda self, partial: partial)
    monkeypatch.setattr(TensorParallel, "all_gather_last_dim", lambda self, part, parts: part)


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-8, 8, shape)


def fill(layer: LinearLayer, shard: str | None, stored: dict[str, torch.Tensor]) -> None:
    for name, tensor in stored.items():
        layer.load_parameter(name, tensor, shard)


def test_packing_is_undone() -> None:
    values = torch.randint(0, 16, (16, 24))
    for dim in (0, 1):
        assert torch.equal(unpack(pack(values, dim), dim), values)


@by_format
@by_ranks
def test_merged_matrices_keep_their_own_scales(method: Any, ranks: list[TensorParallel]) -> None:
    matrices = {
        name: method.quantized(integers(OUT, IN), scale) for name, scale in (("gate", 2.0), ("up", 0.25))
    }
    x, bias = integers(3, IN).float(), integers(OUT).float()
    outputs: dict[str, list[torch.Tensor]] = {"gate": [], "up": []}
    for parallel in ranks:
        sizes = dict.fromkeys(matrices, OUT)
        layer = MergedColumnParallelLinear(
            "gate_up", IN, sizes, bias=True, methods=SameMethod(method), parallel=parallel
        )
        for name, (stored, _) in matrices.items():
            fill(layer, name, {**stored, "bias": bias})
        parts = layer(x).split(OUT // parallel.size, dim=-1)
        for name, part in zip(outputs, parts, strict=True):
            outputs[name].append(part)
    for name, (_, weight) in matrices.items():
        assert torch.equal(torch.cat(outputs[name], dim=-1), x @ weight.T + bias), name


@by_format
@by_ranks
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_heads_keep_their_scales_even_where_ranks_share_them(
    method: Any, ranks: list[TensorParallel], num_kv_heads: int
) -> None:
    head_dim, num_heads = 16, 4
    outs = {"q": num_heads * head_dim, "k": num_kv_heads * head_dim, "v": num_kv_heads * head_dim}
    matrices = {
        name: method.quantized(integers(out, IN), 2.0**index)
        for index, (name, out) in enumerate(outs.items())
    }
    x = integers(3, IN).float()
    for parallel in ranks:
        layer = QKVParallelLinear(
            "qkv",
            IN,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            bias=False,
            methods=SameMethod(method),
            parallel=parallel,
        )
        for name, (stored, _) in matrices.items():
            fill(layer, name, stored)
        expected = []
        for name, size in zip("qkv", layer.parts.values(), strict=True):
            whole = x @ matrices[name][1].T
            count = size.outputs.size // head_dim
            own = parallel.rank * count if name == "q" or num_kv_heads > 1 else 0
            expected.append(whole[:, own * head_dim : (own + count) * head_dim])
        assert torch.equal(layer(x), torch.cat(expected, dim=-1))


@by_format
@by_ranks
def test_row_parallel_parts_add_up_to_the_whole(method: Any, ranks: list[TensorParallel]) -> None:
    stored, weight = method.quantized(integers(OUT, IN), 0.5)
    x, bias, part = integers(3, IN).float(), integers(OUT).float(), IN // len(ranks)
    total = torch.zeros(3, OUT)
    for parallel in ranks:
        layer = RowParallelLinear("o", IN, OUT, bias=True, methods=SameMethod(method), parallel=parallel)
        fill(layer, None, {**stored, "bias": bias})
        total += layer(x[:, parallel.rank * part : (parallel.rank + 1) * part])
    assert torch.equal(total, x @ weight.T + bias)


@by_format
@by_ranks
def test_the_output_projection_may_be_quantized_too(method: Any, ranks: list[TensorParallel]) -> None:
    stored, weight = method.quantized(integers(OUT, IN), 0.5)
    x, parts = integers(3, IN).float(), []
    for parallel in ranks:
        head = ParallelLMHead("lm_head", OUT, IN, methods=SameMethod(method), parallel=parallel, tied_to=None)
        fill(head, None, stored)
        parts.append(head(x))
    assert torch.equal(torch.cat(parts, dim=-1), x @ weight.T)


def test_blocks_of_scales_begin_anew_in_each_matrix_and_may_be_incomplete() -> None:
    method = BlockScaled()
    sizes = {"gate": 12, "up": 20}  # of blocks of 8
    layer = MergedColumnParallelLinear(
        "gate_up", 20, sizes, bias=False, methods=SameMethod(method), parallel=TensorParallel()
    )
    x, expected = integers(3, 20).float(), []
    for name, size in sizes.items():
        stored, weight = method.quantized(integers(size, 20), 1.0)
        fill(layer, name, stored)
        expected.append(x @ weight.T)
    assert torch.equal(layer(x), torch.cat(expected, dim=-1))


class Registers(LinearMethod):
    """Creates what it is told."""

    def __init__(self, make: Callable[[LinearShape], LinearWeight]) -> None:
        self._make = make

    def create_weights(self, layer: nn.Module, shape: LinearShape) -> None:
        layer.register_parameter("table", self._make(shape))

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        raise AssertionError


def merged(method: LinearMethod, parallel: TensorParallel | None = None) -> LinearLayer:
    sizes = {"gate": OUT, "up": OUT}
    return MergedColumnParallelLinear(
        "gate_up", IN, sizes, bias=False, methods=SameMethod(method), parallel=parallel or TensorParallel()
    )


def test_shards_that_would_overwrite_each_other_are_refused_when_the_layer_is_made() -> None:
    one_scale = Registers(lambda shape: LinearWeight.make(torch.empty(1)))
    with pytest.raises(SplitError, match=r"gate_up\.table has neither .* its 2 shards would overwrite"):
        merged(one_scale)
    RowParallelLinear("o", IN, OUT, bias=False, methods=SameMethod(one_scale), parallel=TensorParallel())


def test_an_entry_for_each_shard_may_be_more_than_a_number() -> None:
    groups = Registers(lambda shape: LinearWeight.make(torch.empty(len(shape.shards), IN), per_shard=True))
    layer, rows = merged(groups), {"gate": torch.randn(IN), "up": torch.randn(IN)}
    for name, row in rows.items():
        layer.load_parameter("table", row, name)
    assert torch.equal(layer.table, torch.stack(list(rows.values())))
    with pytest.raises(ShardError, match=r"has shape \[63\]; \[64\] is needed"):
        layer.load_parameter("table", torch.randn(IN - 1), "up")


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_single_scale_is_taken_in_any_shape(shape: tuple[int, ...]) -> None:
    layer = merged(Registers(lambda made: LinearWeight.make(torch.zeros(2), per_shard=True)))
    layer.load_parameter("table", torch.full(shape, 3.0), "up")
    assert layer.table.tolist() == [0.0, 3.0]


def test_bytes_that_hold_blocks_of_features_are_split_by_whole_blocks() -> None:
    """GGML's Q4_K: 256 features in 144 bytes of a row."""
    method = Registers(
        lambda shape: LinearWeight.make(
            torch.zeros(OUT, shape.in_features // 256 * 144, dtype=torch.uint8),
            output=FeatureDim(0),
            input=FeatureDim(1, 256, 144),
        )
    )
    stored = torch.randint(0, 256, (OUT, 4 * 144), dtype=torch.uint8)
    for parallel in WORLDS[1]:
        layer = RowParallelLinear("o", 1024, OUT, bias=False, methods=SameMethod(method), parallel=parallel)
        layer.load_parameter("table", stored, None)
        assert torch.equal(layer.table, stored[:, parallel.rank * 288 : (parallel.rank + 1) * 288])


class Side:
    """Ranks side by side in one process, which exchange what they gather."""

    def __init__(self, size: int) -> None:
        self.ranks = [TensorParallel(rank, size) for rank in range(size)]
        self.given: dict[tuple[int, int], torch.Tensor] = {}
        self.calls = [0] * size

    def gather(
        self, parallel: TensorParallel, part: torch.Tensor, parts: Sequence[FeatureRange]
    ) -> torch.Tensor:
        """What all have given at the same place, with zeros for those who have not come there yet."""
        place, self.calls[parallel.rank] = self.calls[parallel.rank], self.calls[parallel.rank] + 1
        self.given[place, parallel.rank] = part
        missing = [torch.zeros(*part.shape[:-1], each.size) for each in parts]
        return torch.cat([self.given.get((place, rank), missing[rank]) for rank in range(len(parts))], -1)

    def run(self, compute: Callable[[int], torch.Tensor]) -> list[torch.Tensor]:
        """The ranks' results, computed over and over until each has had all that it waits for."""
        for _ in range(3):
            self.calls = [0] * len(self.ranks)
            results = [compute(rank) for rank in range(len(self.ranks))]
        return results


class OneScale(DenseMethod):
    """A plain weight and a number that no rank may be without, as formats that cannot be split have it."""

    def create_weights(self, layer: nn.Module, shape: LinearShape) -> None:
        if any(shard.held.size < shard.held.total for shard in shape.shards) or (
            shape.inputs.size < shape.inputs.total
        ):
            raise SplitError("it is whole or not at all")
        super().create_weights(layer, shape)

    def quantized(self, values: torch.Tensor, scale: float) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        weight = values.float() * scale
        return {"weight": weight}, weight


@pytest.mark.parametrize(
    ("method", "in_features"),
    [(PackedInt4(), 3 * GROUP), (OneScale(), IN)],
    ids=["a group is cut", "nothing can be split"],
)
def test_what_cannot_be_split_by_inputs_is_split_by_outputs_or_not_at_all(
    method: Any, in_features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = Side(2)
    monkeypatch.setattr(
        TensorParallel, "all_gather_last_dim", lambda self, part, parts: side.gather(self, part, parts)
    )
    stored, weight = method.quantized(integers(OUT, in_features), 0.5)
    x, bias, layers = integers(3, in_features).float(), integers(OUT).float(), []
    for parallel in side.ranks:
        layer = RowParallelLinear(
            "o", in_features, OUT, bias=True, methods=SameMethod(method), parallel=parallel
        )
        fill(layer, None, {**stored, "bias": bias})
        layers.append(layer)
    parts = side.ranks[0].parts(in_features, "")
    for result in side.run(lambda rank: layers[rank](x[:, parts[rank].first :][:, : parts[rank].size])):
        assert torch.equal(result, x @ weight.T + bias)


@pytest.mark.parametrize("method", [PackedInt4(along_output=True), OneScale()], ids=["words", "not at all"])
def test_outputs_that_cannot_be_split_are_computed_by_every_rank_which_takes_its_own(method: Any) -> None:
    sizes, x = {"gate": 24, "up": 24}, integers(3, IN).float()
    matrices = {name: method.quantized(integers(24, IN), 0.5) for name in sizes}
    parts: list[torch.Tensor] = []
    for parallel in WORLDS[1]:
        layer = MergedColumnParallelLinear(
            "gate_up", IN, sizes, bias=False, methods=SameMethod(method), parallel=parallel
        )
        for name, (stored, _) in matrices.items():
            fill(layer, name, stored)
        parts.append(layer(x))
    gate, up = (x @ weight.T for _, weight in matrices.values())
    for rank, part in enumerate(parts):
        own = slice(rank * 12, rank * 12 + 12)
        assert torch.equal(part, torch.cat((gate[:, own], up[:, own]), -1))


@pytest.mark.parametrize(
    ("total", "size", "block", "sizes"),
    [
        (4096, 4, 128, [1024] * 4),
        (29568, 8, 128, [3712] * 7 + [3584]),  # Qwen2.5 72B: groups of 128 that do not divide
        (11008, 4, 1, [2752] * 4),
        (49155, 2, 1, [24578, 24577]),  # Granite's vocabulary
        (3, 2, 1, [2, 1]),
    ],
)
def test_features_are_shared_in_equal_parts_or_by_whole_blocks(
    total: int, size: int, block: int, sizes: list[int]
) -> None:
    parts = TensorParallel(0, size, None, block).parts(total, "x")
    assert [each.size for each in parts] == sizes
    assert [each.first for each in parts] == [sum(sizes[:rank]) for rank in range(size)]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "shares"),
    [
        (9, 3, 2, [(0, 6, 0, 2), (6, 3, 2, 1)]),  # SmolLM2 135M
        (8, 2, 4, [(0, 2, 0, 1), (2, 2, 0, 1), (4, 2, 1, 1), (6, 2, 1, 1)]),
        (71, 1, 2, [(0, 36, 0, 1), (36, 35, 0, 1)]),  # Falcon 7B
    ],
)
def test_heads_are_shared_with_the_key_value_heads_that_they_read(
    heads: int, kv_heads: int, size: int, shares: list[tuple[int, ...]]
) -> None:
    found = [TensorParallel(rank, size).share_heads(heads, kv_heads) for rank in range(size)]
    assert [
        (each.heads.first, each.heads.size, each.kv_heads.first, each.kv_heads.size) for each in found
    ] == shares


def test_fewer_key_value_heads_than_ranks_that_do_not_divide_them_are_refused() -> None:
    with pytest.raises(SplitError, match="num_key_value_heads is 3, fewer than ranks, and does not divide"):
        TensorParallel(0, 4).share_heads(9, 3)


class ByModule(LinearMethods):
    """Quantized, but for what is excluded."""

    def __init__(self, excluded: list[str]) -> None:
        self._excluded = ExcludedModules(excluded, "config.json")
        self._quantized, self._dense = PackedInt4(), DenseMethod()

    def for_matrix(self, layer: str, shard: str, *, changes: bool = False) -> LinearMethod:
        module = checkpoint_names("LlamaForCausalLM").module(layer, shard)
        return self._dense if module in self._excluded else self._quantized


EXCLUDED = {
    "none": [],
    "whole layers": ["lm_head", "model.layers.0", "mlp.down_proj"],
    "one of a fused layer": ["re:.*layers[.]1[.].*k_proj", "model.layers.0.self_attn.q_proj", "up_proj"],
}
UNTIED = {**CONFIG, "tie_word_embeddings": False, "attention_bias": True}


def write_pair(directory: Path, excluded: list[str]) -> tuple[Path, Path]:
    """A checkpoint that is quantized where nothing excludes it, and a plain one of the same numbers."""
    patterns, method = ExcludedModules(excluded, ""), PackedInt4()
    mixed: dict[str, torch.Tensor] = {}
    plain = tensors(UNTIED)
    for name, tensor in list(plain.items()):
        module, _, kind = name.rpartition(".")
        if kind != "weight" or "norm" in name or "embed" in name or module in patterns:
            mixed[name] = tensor
            continue
        stored, plain[name] = method.quantized(integers(*tensor.shape), 0.125)
        mixed.update({f"{module}.{key}": value for key, value in stored.items()})
    return write_model(directory / "a", mixed, **UNTIED), write_model(directory / "b", plain, **UNTIED)


@pytest.mark.parametrize("excluded", EXCLUDED.values(), ids=EXCLUDED)
def test_two_number_formats_in_one_model_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, excluded: list[str]
) -> None:
    mixed, plain = write_pair(tmp_path, excluded)
    expected = tokens(plain)
    monkeypatch.setattr(CpuPlatform, "linear_methods", lambda self: ByModule(excluded))
    assert tokens(mixed) == expected


def test_a_fused_layer_of_two_formats_multiplies_runs_of_the_same_one() -> None:
    methods = ByModule(["v_proj"])
    layer = QKVParallelLinear(
        "model.layers.0.self_attn.qkv_proj",
        IN,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        bias=True,
        methods=methods,
        parallel=TensorParallel(),
    )
    assert isinstance(layer.method, SeparateProducts)
    assert [part.checkpoint_shards for part in layer.separate] == [("q", "k"), ("v",)]
    assert [name for name, _ in layer.named_parameters(recurse=False)] == ["bias"]


def test_packed_integers_are_not_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed, _ = write_pair(tmp_path, [])
    from safetensors.torch import load_file, save_file

    stored = load_file(mixed / "model.safetensors")
    stored["lm_head.qweight"] = stored["lm_head.qweight"].to(torch.int64)
    save_file(stored, mixed / "model.safetensors")
    monkeypatch.setattr(CpuPlatform, "linear_methods", lambda self: ByModule([]))
    with pytest.raises(ConfigError, match=r"'lm_head\.qweight' is of int64; int32 are needed"):
        runner(mixed)


def test_a_format_that_cannot_be_fused_is_refused_with_the_model_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = Registers(lambda shape: LinearWeight.make(torch.empty(1)))
    monkeypatch.setattr(CpuPlatform, "linear_methods", lambda self: SameMethod(method))
    with pytest.raises(ConfigError, match=r"config\.json: model\.layers\.0\.self_attn\.qkv_proj\.table has"):
        runner(write_model(tmp_path))


def test_dummy_quantized_weights_span_their_integers_and_have_positive_scales(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(UNTIED))
    monkeypatch.setattr(CpuPlatform, "linear_methods", lambda self: ByModule(["down_proj"]))
    first, again, other = (
        runner(tmp_path, load_format="dummy", seed=seed).model.state_dict() for seed in (1, 1, 2)
    )
    name = "model.layers.0.self_attn.qkv_proj"
    words = first[f"{name}.qweight"]
    assert torch.equal(words, again[f"{name}.qweight"])
    assert not torch.equal(words, other[f"{name}.qweight"])
    assert unpack(words, 0).unique().tolist() == list(range(16))
    for scales in (first[f"{name}.scales"], first[f"{name}.matrix_scale"]):
        assert 0 < scales.min() <= scales.max() < 0.01
    assert first["model.layers.0.mlp.down_proj.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert tokens(tmp_path, load_format="dummy")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_dummy_weights_of_any_number_format_are_finite_and_various(dtype: torch.dtype) -> None:
    from engine.loader.dummy import _fill

    weight = LinearWeight.make(torch.zeros(64, 64, dtype=dtype), output=FeatureDim(0))
    _fill(weight, 0.0, torch.Generator().manual_seed(0))
    values = weight.float()
    assert values.isfinite().all()
    assert len(values.unique()) == 2 if dtype is torch.bool else len(values.unique()) > 100


def test_every_layer_of_a_model_knows_its_own_name(tmp_path: Path) -> None:
    model = runner(write_model(tmp_path)).model
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LinearLayer)}
    assert len(layers) == 2 * 4 + 1
    assert all(module.layer_name == path for path, module in layers.items())
