"""Rotation and storing against their definition, in caches that are poisoned first."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from engine.kernels.rotate_and_store.kernel import launch_shape, rotate_and_store
from engine.kernels.rotate_and_store.naive import naive_rotate_and_store
from tests.kernels.hopper import compile_overlapping

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
# (H, HK, D): every head dimension; heads that do not fill a group, one group exactly, several groups.
HEADS = [(9, 3, 64), (4, 4, 80), (5, 1, 96), (16, 8, 128), (4, 2, 256)] + [
    (32, 8, 128), (32, 32, 80), (71, 1, 64)
] * ON_GPU  # fmt: skip
NUM_TOKENS = [1, 5] + [33, 257] * ON_GPU
# Both compute in fp32 and round once.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
BLOCK_SIZE, MAX_POSITION = 4, 300


@dataclass(slots=True)
class Case:
    """Random projections, and slots scattered over a pool of NaN; some tokens are padding."""

    qkv: torch.Tensor
    positions: torch.Tensor | None
    table: torch.Tensor | None
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    slot_mapping: torch.Tensor
    heads: tuple[int, int, int]

    def rotating(self, rotary_dim: int) -> Case:
        """The same case with angles for so many channels of each head alone; without any for none."""
        half = rotary_dim // 2
        cos, sin = self.table.chunk(2, dim=-1)
        table = torch.cat((cos[:, :half], sin[:, :half]), dim=-1) if rotary_dim else None
        positions = self.positions if rotary_dim else None
        return replace(self, positions=positions, table=table)

    @property
    def arguments(self) -> tuple[torch.Tensor | None, ...]:
        caches = self.key_cache, self.value_cache
        return self.qkv, self.positions, self.table, *caches, self.slot_mapping

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(("num_heads", "num_kv_heads", "head_dim"), self.heads, strict=True))

    def norms(self) -> dict[str, torch.Tensor]:
        """Weights for queries and for keys, which differ."""
        shape, like = self.heads[2], self.qkv
        return {name: torch.randn(shape, device=DEVICE).to(like.dtype) for name in ("q_norm", "k_norm")}

    def copy(self) -> Case:
        """The same case with its own qkv and caches."""
        clones = (tensor.clone() for tensor in (self.qkv, self.key_cache, self.value_cache))
        qkv, key_cache, value_cache = clones
        return Case(qkv, self.positions, self.table, key_cache, value_cache, self.slot_mapping, self.heads)


def make_case(
    num_tokens: int, heads: tuple[int, int, int], dtype: torch.dtype, slot_dtype: torch.dtype = torch.int32
) -> Case:
    num_heads, num_kv_heads, head_dim = heads
    num_blocks = num_tokens // BLOCK_SIZE + 3
    channels = torch.arange(head_dim // 2, device=DEVICE) / head_dim * 2
    angles = torch.arange(MAX_POSITION, device=DEVICE)[:, None] * 1e4**-channels
    pools = [
        torch.full((num_blocks, BLOCK_SIZE, num_kv_heads, head_dim), torch.nan, dtype=dtype, device=DEVICE)
        for _ in range(2)
    ]
    slots = torch.randperm(num_blocks * BLOCK_SIZE, device=DEVICE)[:num_tokens]
    slots[1::3] = -1
    return Case(
        torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, device=DEVICE).to(dtype),
        torch.randint(MAX_POSITION, (num_tokens,), dtype=torch.int32, device=DEVICE),
        torch.cat((angles.cos(), angles.sin()), dim=-1),
        *pools,
        slots.to(slot_dtype),
        heads,
    )


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to one rounding, NaN exactly where NaN is expected. Rotation may cancel: hence atol."""
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[expected.dtype], atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_equals_its_definition(
    num_tokens: int, heads: tuple[int, int, int], normed: bool, dtype: torch.dtype
) -> None:
    case = make_case(num_tokens, heads, dtype)
    norms = case.norms() if normed else {}
    reference = case.copy()
    expected = naive_rotate_and_store(*reference.arguments, **case.sizes, **norms)
    query = rotate_and_store(*case.arguments, **case.sizes, **norms)
    close(query, expected)
    close(case.key_cache, reference.key_cache)
    close(case.value_cache, reference.value_cache)


# Rotated channels of 64 and of 80: all, half (ChatGLM), 0.4 (Phi), none.
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "interleaved"),
    [
        *[(64, 64, True), (64, 32, False), (64, 32, True), (64, 0, False)],
        *[(80, 80, True), (80, 32, False), (80, 32, True), (80, 0, False)],
    ],
)
def test_pairs_of_every_kind_are_rotated_and_all_else_is_kept(
    head_dim: int, rotary_dim: int, interleaved: bool, normed: bool
) -> None:
    for dtype in DTYPES:
        case = make_case(5, (9, 3, head_dim), dtype).rotating(rotary_dim)
        norms = case.norms() if normed else {}
        reference = case.copy()
        options = {"interleaved": interleaved, **case.sizes, **norms}
        expected = naive_rotate_and_store(*reference.arguments, **options)
        close(rotate_and_store(*case.arguments, **options), expected)
        close(case.key_cache, reference.key_cache)
        close(case.value_cache, reference.value_cache)


@pytest.mark.parametrize("heads", HEADS[2:4], ids=str)
def test_caches_of_e4m3_are_scaled_and_saturated(heads: tuple[int, int, int]) -> None:
    case = make_case(5, heads, DTYPES[-1])
    case.qkv *= 100
    case = replace(
        case,
        key_cache=case.key_cache.to(torch.float8_e4m3fn),
        value_cache=case.value_cache.to(torch.float8_e4m3fn),
    )
    scales = torch.tensor([0.25, 0.125], device=DEVICE)
    reference = case.copy()
    expected = naive_rotate_and_store(*reference.arguments, **case.sizes, kv_scales=scales)
    query = rotate_and_store(*case.arguments, **case.sizes, kv_scales=scales)
    close(query, expected)
    for ours, theirs in (
        (case.key_cache, reference.key_cache),
        (case.value_cache, reference.value_cache),
    ):
        # Keys that fp32 rounds differently may be neighbours in e4m3.
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.13, atol=2e-3, equal_nan=True)
        held = ~theirs.float().isnan()
        assert (ours.float() == theirs.float())[held].float().mean() > 0.99
        assert ours.float().nan_to_num().abs().max() == 448


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64], ids=str)
def test_queries_replace_their_projections_and_nothing_else(slot_dtype: torch.dtype) -> None:
    case = make_case(5, (9, 3, 64), torch.float32, slot_dtype)
    reference = case.copy()
    expected = naive_rotate_and_store(*reference.arguments, **case.sizes)
    query = rotate_and_store(*case.arguments, **case.sizes)
    assert query.data_ptr() == case.qkv.data_ptr()
    close(query, expected)
    assert torch.equal(case.qkv[:, 9 * 64 :], reference.qkv[:, 9 * 64 :])
    close(case.key_cache, reference.key_cache)
    close(case.value_cache, reference.value_cache)


def test_caches_and_rows_may_be_strided() -> None:
    """A pool allocated [num_blocks, HK, block_size, D], and projections that are part of a wider tensor."""
    case = make_case(7, (4, 2, 64), torch.float32)
    reference = case.copy()
    case.key_cache, case.value_cache = (
        torch.full((len(case.key_cache), 2, BLOCK_SIZE, 64), torch.nan, device=DEVICE).transpose(1, 2)
        for _ in range(2)
    )
    wide = torch.randn(7, case.qkv.shape[1] + 24, device=DEVICE)
    wide[:, 8:-16] = case.qkv
    case.qkv = wide[:, 8:-16]
    expected = naive_rotate_and_store(*reference.arguments, **case.sizes)
    close(rotate_and_store(*case.arguments, **case.sizes), expected)
    close(case.key_cache, reference.key_cache)
    close(case.value_cache, reference.value_cache)


def test_padding_alone_leaves_the_cache_as_it_was() -> None:
    case = make_case(3, (4, 2, 64), torch.float32)
    case.slot_mapping.fill_(-1)
    assert bool(rotate_and_store(*case.arguments, **case.sizes).isfinite().all())
    assert bool(case.key_cache.isnan().all())
    assert bool(case.value_cache.isnan().all())


@pytest.mark.skipif(not ON_GPU, reason="needs 8 GiB of pool")
def test_slots_beyond_two_to_the_31_elements() -> None:
    case = make_case(3, (8, 8, 128), torch.bfloat16)
    reference = case.copy()
    reference.slot_mapping = torch.arange(3, device=DEVICE)
    naive_rotate_and_store(*reference.arguments, **case.sizes)
    blocks = (1 << 31) // (BLOCK_SIZE * 8 * 128) + 2
    shape = (blocks, BLOCK_SIZE, 8, 128)
    case.key_cache, case.value_cache = (
        torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)
    )
    case.slot_mapping[:] = torch.tensor([blocks * BLOCK_SIZE - 1, 1, blocks * BLOCK_SIZE - 7])
    rotate_and_store(*case.arguments, **case.sizes)
    slots = case.slot_mapping.long()
    close(case.key_cache.view(-1, 8, 128)[slots], reference.key_cache.view(-1, 8, 128)[:3])
    close(case.value_cache.view(-1, 8, 128)[slots], reference.value_cache.view(-1, 8, 128)[:3])


@pytest.mark.parametrize(
    ("heads", "normed", "rotary_dim", "interleaved"),
    [
        ((32, 8, 128), False, 128, False),
        ((16, 8, 128), True, 128, False),
        ((32, 2, 128), False, 64, True),
        ((32, 8, 128), True, 0, False),
    ],
    ids=["llama", "qwen3", "chatglm", "without angles"],
)
def test_compiles_for_hopper(
    heads: tuple[int, int, int], normed: bool, rotary_dim: int, interleaved: bool
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    group, half, num_warps = launch_shape(head_dim)
    norms = ["q_norm", "k_norm"]
    strides = ["qkv", "cache_block", "cache_slot", "cache_head"]
    signature = dict.fromkeys(["qkv", "key_cache", "value_cache", *norms * normed], "*bf16")
    signature |= {f"{name}_stride": "i32" for name in strides}
    signature |= {"slot_mapping": "*i32", "eps": "fp32"}
    constants = dict.fromkeys(["kv_scales"] if normed else ["kv_scales", *norms])
    angles = {"positions": "*i32", "table": "*fp32"}
    if rotary_dim:
        signature |= angles
    else:
        constants |= dict.fromkeys(angles)
    constants |= {"NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads, "HEAD_DIM": head_dim}
    constants |= {"BLOCK_SIZE": 16, "HEADS": group, "HALF": half}
    constants |= {"ROTARY_DIM": rotary_dim, "INTERLEAVED": interleaved}
    sizes = compile_overlapping(
        "engine.kernels.rotate_and_store.kernel:rotate_and_store_kernel",
        signature,
        constants,
        early_reads=["slot_mapping", *(angles if rotary_dim else ()), *norms * normed],
        num_warps=num_warps,
    )
    assert sizes["shared"] < 227 << 10
