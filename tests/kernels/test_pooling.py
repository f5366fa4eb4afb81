"""The pooling kernel against its naive definition, on poisoned sums and outputs."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.pooling.kernel import PooledColumns, pool_hidden
from engine.kernels.pooling.naive import naive_pool
from tests.kernels.hopper import compile_for_hopper

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU
# (row, first token, past the last, whether it goes on, divisor, place in the output).
CHUNKS = [
    (4, 0, 37, 0, 0, -1),
    (-1, 0, 5, 1, 3, 2),
    (0, 37, 38, 0, 1, 1),
    (2, 40, 40, 1, 1, 3),
    (6, 40, 90, 1, 77, 0),
    (5, 9, 9, 0, 0, -1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [24, 200] + [4096] * GPU)
def test_pooled_states_equal_the_definition(size: int, dtype: torch.dtype) -> None:
    hidden = torch.randn(90, size).to(dtype)
    sums = torch.full((7, size), torch.nan)
    sums[[2, 6]] = torch.randn(2, size)
    out = torch.full((len(CHUNKS), size), torch.nan, device=DEVICE)
    columns = PooledColumns(
        *(torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in zip(*CHUNKS, strict=True))
    )
    found = sums.clone().to(DEVICE)
    pool_hidden(hidden.to(DEVICE), columns, sums=found, out=out)
    for row, begin, end, continues, divisor, place in CHUNKS:
        if row < 0:
            continue
        total, state = naive_pool(hidden[begin:end], sums[row] if continues else None, divisor)
        torch.testing.assert_close(found[row].cpu(), total, rtol=1e-5, atol=1e-5)
        if state is not None:
            torch.testing.assert_close(out[place].cpu(), state, rtol=1e-5, atol=1e-5)
    assert found[[1, 3]].isnan().all()
    assert out[[2, 4, 5]].isnan().all()


def test_one_state_is_exactly_itself() -> None:
    hidden = torch.randn(3, 40, dtype=torch.float16)
    values = ([0], [2], [3], [0], [1], [0])
    columns = PooledColumns(*(torch.tensor(v, dtype=torch.int32, device=DEVICE) for v in values))
    out = torch.empty(1, 40, device=DEVICE)
    pool_hidden(hidden.to(DEVICE), columns, sums=torch.full((1, 40), torch.nan, device=DEVICE), out=out)
    assert torch.equal(out[0].cpu(), hidden[2].float())


def test_compiles_for_hopper() -> None:
    signature = {"hidden": "*bf16", "hidden_stride": "i32", "sums": "*fp32", "out": "*fp32"}
    arrays = ("rows", "begins", "ends", "continues", "divisors", "places")
    signature |= dict.fromkeys(arrays, "*i32")
    constants = {"SIZE": 8192, "BLOCK_TOKENS": 16, "BLOCK_SIZE": 128}
    sizes = compile_for_hopper("engine.kernels.pooling.kernel:_pool", signature, constants, num_warps=4)
    assert sizes["shared"] <= 227 * 1024
