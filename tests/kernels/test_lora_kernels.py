"""Adapters' kernels against their definition, with many adapters and none side by side."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.linear.matrix_vector import RowsConfig
from engine.kernels.lora.kernel import (
    AdapterTiles,
    add_adapters,
    most_tiles,
    one_token_with_adapter,
    tile_tokens,
)
from engine.kernels.lora.naive import naive_adapters

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOTS, RANK = 3, 32
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]


def memory(k: int, sizes: tuple[int, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Slots of ranks 16, 32 and 0; what lies behind a rank is poison, and so is what has no vectors."""
    torch.manual_seed(0)
    n, parts = sum(sizes), len(sizes)
    a = torch.randn(SLOTS, parts, RANK, k, device=DEVICE, dtype=dtype)
    b = torch.randn(SLOTS, n, RANK, device=DEVICE, dtype=dtype) * 0.1
    gain, offset = torch.randn(2, SLOTS, n, device=DEVICE)
    a[0, :, 16:], b[0, :, 16:] = torch.nan, torch.nan
    a[2], b[2], gain[0], offset[0] = torch.nan, torch.nan, torch.nan, torch.nan
    ranks = torch.tensor([16, 32, 0], dtype=torch.int32, device=DEVICE)
    has_vectors = torch.tensor([0, 1, 1], dtype=torch.int32, device=DEVICE)
    return {"a": a, "b": b, "gain": gain, "offset": offset, "ranks": ranks, "has_vectors": has_vectors}


def expected(
    x: torch.Tensor,
    out: torch.Tensor,
    slots: torch.Tensor,
    held: dict[str, torch.Tensor],
    sizes: tuple[int, ...],
) -> torch.Tensor:
    a, b, gain, offset = (held[name].clone().nan_to_num(0.0) for name in ("a", "b", "gain", "offset"))
    gain[0], offset[0] = 1, 0
    return naive_adapters(x, out, slots, a, b, sizes, gain=gain, offset=offset)


def tiles_of(slots: torch.Tensor, block_m: int) -> AdapterTiles:
    order = [int(i) for i in torch.argsort(slots.cpu(), stable=True) if slots[i] >= 0]
    columns = {"slot": [], "begin": [], "end": []}  # type: ignore[var-annotated]
    begin = 0
    while begin < len(order):
        slot, end = int(slots[order[begin]]), begin
        while end < len(order) and end - begin < block_m and int(slots[order[end]]) == slot:
            end += 1
        for name, value in (("slot", slot), ("begin", begin), ("end", end)):
            columns[name].append(value)
        begin = end
    spare = most_tiles(len(slots), SLOTS, block_m) - len(columns["slot"])
    assert spare >= 0
    tensors = {
        name: torch.tensor(values + [-1] * spare, dtype=torch.int32, device=DEVICE)
        for name, values in columns.items()
    }
    tokens = torch.tensor(order + [0] * (len(slots) - len(order)), dtype=torch.int32, device=DEVICE)
    return AdapterTiles(tokens, tensors["slot"], tensors["begin"], tensors["end"], block_m)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(72,), (64, 24, 24)])
@pytest.mark.parametrize("num_tokens", [3, 21])
def test_each_token_gets_what_its_adapter_adds(
    num_tokens: int, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    k = 144
    held = memory(k, sizes, dtype)
    slots = torch.tensor([(7 * i) % 4 - 1 for i in range(num_tokens)], device=DEVICE)
    x = torch.randn(num_tokens, k, device=DEVICE, dtype=dtype)
    out = torch.randn(num_tokens, sum(sizes), device=DEVICE, dtype=dtype)
    wanted = expected(x, out, slots, held, sizes)
    for invariant in (False, True):
        result = out.clone()
        tiles = tiles_of(slots, tile_tokens(num_tokens))
        add_adapters(x, result, sizes=sizes, tiles=tiles, invariant=invariant, **held)
        tolerance = 1e-4 if dtype is torch.float32 else 0.05
        torch.testing.assert_close(result.double(), wanted, atol=tolerance, rtol=tolerance)
    base = slots < 0
    assert torch.equal(result[base], out[base])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slot", [-1, 0, 1])
@pytest.mark.parametrize("sizes", [(72,), (64, 24, 24)])
def test_one_token_is_multiplied_and_adapted_in_two_launches(
    sizes: tuple[int, ...], slot: int, dtype: torch.dtype
) -> None:
    k = 300
    held = memory(k, sizes, dtype)
    x = torch.randn(1, k, device=DEVICE, dtype=dtype)
    w, bias = (
        torch.randn(sum(sizes), k, device=DEVICE, dtype=dtype),
        torch.randn(sum(sizes), device=DEVICE, dtype=dtype),
    )
    result = one_token_with_adapter(
        x,
        w,
        bias,
        sizes=sizes,
        slot=torch.tensor([slot], dtype=torch.int32, device=DEVICE),
        config=RowsConfig(block_n=4, num_warps=1),
        **held,
    )
    base = x.double() @ w.double().T + bias.double()
    wanted = expected(x, base, torch.tensor([slot]), held, sizes)
    tolerance = 1e-3 if dtype is torch.float32 else 0.3
    torch.testing.assert_close(result.double(), wanted, atol=tolerance, rtol=0.02)
