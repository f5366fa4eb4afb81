"""The GPU sampler against its naive definition, on fresh random rows; poisoned outputs and workspaces."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch

from engine.kernels.sampling.kernel import SamplingColumns, SamplingWorkspace, sample_rows
from engine.kernels.sampling.naive import naive_sample

GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if GPU else []
DEVICE = torch.device("cuda" if GPU else "cpu")
# Triton's interpreter computes wrongly in bf16 and takes milliseconds for every few thousand logits.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])
LARGE = [128256, 151936] if GPU else []
NUM_SLOTS, MAX_LEN = 3, 16


@dataclass(frozen=True)
class Ask:
    """What one row samples with."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    draw: float = 0.5


GREEDY = Ask(temperature=0.0)


def columns_of(asks: list[Ask | None]) -> SamplingColumns:
    """One entry per ask, in rows that count down; None is padding."""

    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([getattr(ask or GREEDY, name) for ask in asks], dtype=dtype, device=DEVICE)

    rows = [-1 if ask is None else len(asks) - 1 - i for i, ask in enumerate(asks)]
    return SamplingColumns(
        temperature=column("temperature", torch.float32),
        top_k=column("top_k", torch.int32),
        top_p=column("top_p", torch.float32),
        min_p=column("min_p", torch.float32),
        draw=column("draw", torch.float64),
        rows=torch.tensor(rows, dtype=torch.int32, device=DEVICE),
        positions=torch.arange(len(asks), dtype=torch.int32, device=DEVICE) % MAX_LEN,
    )


def poisoned_workspace(max_rows: int, vocab_size: int) -> SamplingWorkspace:
    workspace = SamplingWorkspace.allocate(max_rows, vocab_size, DEVICE)
    for field in fields(workspace):
        array = getattr(workspace, field.name)
        array.fill_(torch.nan if array.is_floating_point() else -(2**31))
    return workspace


def run(logits: torch.Tensor, asks: list[Ask | None]) -> tuple[list[int], list[float]]:
    """Tokens and largest logits of [S, vocab]; checks that they went where they should, and nowhere else."""
    num_rows = len(asks)
    columns = columns_of(asks)
    token_ids = torch.full((num_rows, MAX_LEN), -7, dtype=torch.int32, device=DEVICE)
    out = torch.full((NUM_SLOTS, num_rows + 2), -7, dtype=torch.int32, device=DEVICE)
    largest = torch.full((NUM_SLOTS, num_rows + 2), -7.0, device=DEVICE)
    sample_rows(
        logits.to(DEVICE),
        columns=columns,
        token_ids=token_ids,
        out_token_ids=out,
        out_largest=largest,
        slot=torch.tensor([1], dtype=torch.int32, device=DEVICE),
        workspace=poisoned_workspace(num_rows, logits.shape[1]),
    )
    tokens = out[1, :num_rows].clone()
    appended = torch.full_like(token_ids, -7)
    for i, ask in enumerate(asks):
        if ask is not None:
            appended[columns.rows[i], columns.positions[i]] = tokens[i]
    assert torch.equal(token_ids, appended)
    out[1, :num_rows] = -7
    assert (out == -7).all()
    assert (largest[[0, 2]] == -7).all()
    return tokens.tolist(), largest[1, :num_rows].tolist()


def explained(logits: torch.Tensor, ask: Ask, token: int) -> bool:
    """Whether it is the defined token, or would be but for rounding where two tokens meet."""
    for draw_step in (0.0, -2e-6, 2e-6):
        for scale in (1.0, 1 - 2e-6, 1 + 2e-6):
            expected = naive_sample(
                logits.cpu(),
                temperature=ask.temperature,
                top_k=ask.top_k,
                top_p=float(torch.tensor(ask.top_p)) * (scale if ask.top_p < 1 else 1.0),
                min_p=float(torch.tensor(ask.min_p)) * (scale if ask.min_p < 1 else 1.0),
                draw=min(max(ask.draw + draw_step, 1e-17), 1 - 1e-16),
            )
            if expected == token:
                return True
    return False


def rows_like(kind: str, num_rows: int, vocab_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Random, peaked, flat, tied (few distinct values), or clustered logits, [S, vocab]."""
    x = torch.randn(num_rows, vocab_size)
    if kind == "peaked":
        x = x * 6
    elif kind == "flat":
        x = x * 1e-3 - 4
    elif kind == "tied":
        x = (x * 2).round()
    elif kind == "clustered":
        x[:, vocab_size // 2 : vocab_size // 2 + 9] += 8
    return x.to(dtype)


FILTERS = [
    Ask(),
    Ask(temperature=0.3),
    Ask(top_k=1),
    Ask(top_k=5, temperature=2.5),
    Ask(top_p=0.9),
    Ask(top_p=0.5, temperature=0.7),
    Ask(top_p=1e-6),
    Ask(min_p=0.1),
    Ask(min_p=1.0),
    Ask(top_k=40, top_p=0.8),
    Ask(min_p=0.02, top_k=30, top_p=0.95, temperature=1.5),
    Ask(top_k=10**6, top_p=0.7),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [7, 129, 3001, *LARGE])
@pytest.mark.parametrize("kind", ["random", "peaked", "flat", "tied", "clustered"])
def test_draws_what_the_definition_draws(kind: str, vocab_size: int, dtype: torch.dtype) -> None:
    asks = FILTERS if GPU else FILTERS[:: 3 if vocab_size > 1000 else 2]
    draws = torch.rand(len(asks), dtype=torch.float64).tolist()
    asks = [Ask(**{**vars(ask), "draw": draw}) for ask, draw in zip(asks, draws, strict=True)]
    logits = rows_like(kind, len(asks), vocab_size, dtype)
    tokens, largest = run(logits, asks)
    assert largest == logits.float().max(1).values.tolist()
    for row, (ask, token) in enumerate(zip(asks, tokens, strict=True)):
        assert explained(logits[row], ask, token), (ask, token)
