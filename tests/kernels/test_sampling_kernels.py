"""The GPU sampler against its naive definition, on fresh random rows; poisoned outputs and workspaces."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.sampling.adjust import (
    AdjustWorkspace,
    BadWords,
    Penalties,
    RaggedLists,
    TokenMasks,
    adjust_logits,
)
from engine.kernels.sampling.kernel import SamplingColumns, SamplingWorkspace, sample_rows
from engine.kernels.sampling.logprobs import Logprobs, LogprobsWorkspace, gather_logprobs
from engine.kernels.sampling.naive import naive_adjust, naive_logprobs, naive_sample
from engine.sampling.masks import pack_mask
from tests.kernels.hopper import compile_for_hopper, compile_overlapping

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# Triton's interpreter computes wrongly in bf16, and takes a tenth of a second for a row with filters.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU
SHAPES = [(7, torch.float32), (3001, torch.float16)] + [
    (vocab_size, dtype) for vocab_size in (129, 20_000, 128_256, 151_936) for dtype in DTYPES
] * GPU
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
    Ask(top_p=0.9),
    Ask(top_k=40, top_p=0.8),
    Ask(min_p=0.02, top_k=30, top_p=0.95, temperature=1.5),
    Ask(temperature=0.3),
    Ask(top_k=5, temperature=2.5),
    Ask(top_p=0.5, temperature=0.7),
    Ask(min_p=0.1),
    Ask(top_p=1e-6),
    Ask(min_p=1.0),
    Ask(top_k=10**6, top_p=0.7),
    Ask(top_k=1),
]


def with_random_draws(asks: list[Ask]) -> list[Ask]:
    return [replace(ask, draw=float(torch.rand((), dtype=torch.float64))) for ask in asks]


def check(logits: torch.Tensor, asks: list[Ask]) -> None:
    tokens, largest = run(logits, asks)
    assert largest == logits.float().max(1).values.tolist()
    for row, (ask, token) in enumerate(zip(asks, tokens, strict=True)):
        assert explained(logits[row], ask, token), (ask, token)


@pytest.mark.parametrize(("vocab_size", "dtype"), SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "peaked", "flat", "tied", "clustered"])
def test_draws_what_the_definition_draws(kind: str, vocab_size: int, dtype: torch.dtype) -> None:
    asks = with_random_draws(FILTERS if GPU else FILTERS[1:4])
    check(rows_like(kind, len(asks), vocab_size, dtype), asks)


@pytest.mark.parametrize("ask", [FILTERS[0], *FILTERS[4:]], ids=str)
def test_filters_at_their_extremes_and_alone(ask: Ask) -> None:
    check(rows_like("tied", 1, 400, torch.float16), with_random_draws([ask]))


@settings(max_examples=200 if GPU else 8)
@given(
    logits=st.lists(st.integers(-8, 8), min_size=1, max_size=300),
    ask=st.builds(
        Ask,
        temperature=st.sampled_from([0.0, 0.2, 1.0, 3.0]),
        top_k=st.integers(0, 30),
        top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
        min_p=st.sampled_from([0.0, 0.05, 0.6]),
        draw=st.floats(1e-9, 1 - 1e-9),
    ),
)
def test_any_filters_over_any_logits(logits: list[int], ask: Ask) -> None:
    check(torch.tensor([logits], dtype=torch.float16) / 2, [ask])


def test_a_row_of_many_chunks_and_tiles() -> None:
    """Kept tokens in several chunks, some of them equal to the smallest of them, most of a flat row's."""
    asks = with_random_draws([Ask(), Ask(top_k=190), Ask(top_p=0.6)])
    check(rows_like("tied", 3, 20_000, torch.float16), asks)


def test_greedy_takes_the_lowest_id_among_equals_of_any_chunk() -> None:
    logits = torch.zeros(4, 20_000, dtype=torch.float16)
    logits[0, [19_999, 9_000, 8_192]] = 3
    logits[1] = -1
    logits[1, [11, 12]] = torch.tensor([-0.0, 0.0], dtype=torch.float16)
    logits[2, 19_999] = 1
    assert run(logits, [GREEDY] * 4)[0] == [8_192, 11, 19_999, 0]


def test_padding_is_not_touched_and_does_not_touch() -> None:
    logits = torch.randn(4, 50)
    logits[1:3] = torch.nan
    logits[0, 30], logits[3, 7] = 99, 99
    tokens, largest = run(logits, [GREEDY, None, None, Ask(top_k=4)])
    assert tokens == [30, -7, -7, 7]
    assert largest == [99, -7, -7, 99]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_noticed(broken: float) -> None:
    """One NaN or infinity in the last chunk, or nothing but -inf; the token stays a valid id."""
    asks = [GREEDY, Ask(), Ask(top_k=3, top_p=0.5, min_p=0.1), GREEDY]
    logits = torch.randn(4, 9_000)
    logits[:3, 8_999 if broken != -torch.inf else slice(None)] = broken
    tokens, largest = run(logits, asks)
    assert np.isfinite(largest).tolist() == [False, False, False, True]
    assert all(0 <= token < 9_000 for token in tokens)


def test_the_smallest_and_the_largest_draw() -> None:
    """The first and the last token that may be drawn, and never one without weight."""
    logits = torch.tensor([-torch.inf, 1.0, 2.0, 3.0, 2.0, -torch.inf]).repeat(6, 1)
    low, high = 2.0**-53, 1 - 2.0**-53
    asks = [
        Ask(draw=low),
        Ask(draw=high),
        Ask(top_p=0.7, draw=low),
        Ask(top_p=0.7, draw=high),
        Ask(top_k=2, draw=high),
        Ask(min_p=0.3, draw=high),
    ]
    # top_p and top_k have room for one of the two equal tokens: the first.
    assert run(logits, asks)[0] == [1, 4, 2, 3, 3, 4]


def test_tiny_and_huge_temperatures_neither_overflow_nor_vanish() -> None:
    logits = torch.tensor([80.0, 81.0, 79.0]).repeat(3, 1)
    asks = [Ask(temperature=1e-6), Ask(temperature=1e-38, top_p=0.9), Ask(temperature=1e30, draw=0.9)]
    assert run(logits, asks)[0] == [1, 1, 2]


@pytest.mark.parametrize("ask", [Ask(), Ask(temperature=2.0, top_k=4), Ask(top_p=0.8)], ids=str)
def test_evenly_spaced_draws_give_every_token_its_share(ask: Ask) -> None:
    num_draws = 5_000 if GPU else 8
    asks = [replace(ask, draw=(i + 0.5) / num_draws) for i in range(num_draws)]
    logits = torch.tensor([1.0, 3.0, 2.0, 0.0, 2.5, -1.0, 2.5])
    tokens, _ = run(logits.half().expand(num_draws, -1), asks)
    weights = torch.softmax(logits / ask.temperature, 0)
    kept = {4: [1, 2, 4, 6], 0: [1, 4, 6, 2] if ask.top_p < 1 else range(7)}[ask.top_k]
    share = torch.zeros(7).index_copy_(0, torch.tensor(list(kept)), weights[list(kept)])
    counts = np.bincount(tokens, minlength=7)
    assert np.abs(counts - (share / share.sum() * num_draws).numpy()).max() <= 1.001


def test_a_row_draws_the_same_in_any_batch() -> None:
    num_rows, vocab_size = (64, 128_256) if GPU else (3, 500)
    asks = with_random_draws([FILTERS[i % 12] for i in range(num_rows)])
    logits = rows_like("random", num_rows, vocab_size, torch.float16)
    together, _ = run(logits, asks)
    backwards, _ = run(logits.flip(0), asks[::-1])
    alone = [run(logits[i : i + 1], [asks[i]])[0][0] for i in range(num_rows)]
    assert together == backwards[::-1] == alone


def adjusted(logits: torch.Tensor, rows: dict[int, dict], sequences: list[list[int]]) -> torch.Tensor:
    """The adjusted rows, given naive_adjust's arguments by entry; entry i's request is row i."""
    index = [-1, *rows]
    asked: list[dict] = [{}, *rows.values()]
    token_ids = torch.full((len(sequences), MAX_LEN), logits.shape[1] - 1, dtype=torch.int32)
    for row, sequence in enumerate(sequences):
        token_ids[row, : len(sequence)] = torch.tensor(sequence)

    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    def column(name: str, default: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([row.get(name, default) for row in asked], dtype=dtype, device=DEVICE)

    def ragged(name: str) -> tuple[list, torch.Tensor]:
        lists = [list(row.get(name, ())) for row in asked]
        offsets = np.cumsum([0, *(len(entries) for entries in lists)]).tolist()
        return [entry for entries in lists for entry in entries], ints(offsets)

    allowed, allowed_offsets = ragged("allowed_ids")
    masked, masked_offsets = ragged("masked_ids")
    bias, bias_offsets = ragged("bias")
    values = [value for row in asked for value in row.get("bias", {}).values()]
    words, first = ragged("bad_words")
    word_offsets = np.cumsum([0, *map(len, words)]).tolist()
    num_prompt_tokens = column("num_prompt_tokens", 0, torch.int32)
    workspace = AdjustWorkspace.allocate(len(index) + 1, logits.shape[1], DEVICE)
    workspace.logits.fill_(torch.nan)
    out = adjust_logits(
        logits.to(DEVICE),
        index=ints(index),
        rows=ints(list(range(len(sequences)))),
        positions=ints([len(sequence) for sequence in sequences]),
        token_ids=token_ids.to(DEVICE),
        penalties=Penalties(
            column("repetition_penalty", 1, torch.float32),
            column("presence_penalty", 0, torch.float32),
            column("frequency_penalty", 0, torch.float32),
            num_prompt_tokens,
        ),
        lists=RaggedLists(
            ints(allowed),
            allowed_offsets,
            ints(masked),
            masked_offsets,
            ints(bias),
            torch.tensor(values, dtype=torch.float32, device=DEVICE),
            bias_offsets,
        ),
        masks=token_masks([row.get("mask") for row in asked]),
        bad_words=BadWords(
            ints([i for word in words for i in word]), ints(word_offsets), first, num_prompt_tokens
        ),
        workspace=workspace,
    )
    assert not workspace.counts.any(), "counts are left clean for the next call"
    assert out[0].isnan().all(), "an entry of -1 is left alone"
    return out[1:].cpu()


def token_masks(masks: list[torch.Tensor | None]) -> TokenMasks:
    """Masks of some rows, packed in a shuffled order behind one that is nobody's."""
    given = [row for row, mask in enumerate(masks) if mask is not None][::-1]
    packed = [pack_mask(masks[row].numpy()).view(np.int32) for row in given]
    bits = torch.from_numpy(np.stack([np.zeros_like(packed[0]), *packed])) if given else torch.zeros(1, 1)
    index = [given.index(row) + 1 if row in given else -1 for row in range(len(masks))]
    return TokenMasks(bits.int().to(DEVICE), torch.tensor(index, dtype=torch.int32, device=DEVICE))


PENALIZED = {
    "repetition": {"repetition_penalty": 1.7},
    "presence and frequency": {"presence_penalty": 0.9, "frequency_penalty": 0.4},
    "encouraged": {"repetition_penalty": 0.6, "presence_penalty": -1.0, "frequency_penalty": -0.5},
    "allowed": {"allowed_ids": [2, 3, 4, 11]},
    "masked and biased": {"masked_ids": [5, 6], "bias": {3: 2.5, 5: 1.0, 9: -4.0}},
    "all": {
        "allowed_ids": [2, 3, 5],
        "masked_ids": [2],
        "bias": {3: -1.5, 7: 9.0},
        "repetition_penalty": 2.0,
    },
    "bad words": {
        # In the output: alone, after one, after three, twice; then those that the output does not complete,
        # that begin in the prompt, and that are longer than the output.
        "bad_words": [[7], [5, 8], [4, 4, 5, 9], [5, 9], [6, 10], [4, 6, 11], [3, 3, 4, 4, 4, 5, 2], [5] * 9],
    },
    "bad words against all else": {
        "bad_words": [[7], [3], [5, 2], [5, 1]],
        "allowed_ids": [2, 3, 5],
        "bias": {3: -1.5, 2: 9.0},
        "repetition_penalty": 2.0,
    },
    "many bad words": {"bad_words": [*[[6]] * 150, [5, 11], *[[4, 8]] * 130, [4, 5, 9]]},
}
MASKED = {
    "mask": {"mask": [0, 3, 7, 11]},
    "mask with bias and penalties": {
        "mask": [2, 3, 5],
        "bias": {3: -1.5, 7: 9.0},
        "repetition_penalty": 2.0,
        "bad_words": [[5, 3], [1]],
    },
    "mask of one": {"mask": [9]},
}


def with_mask(row: dict, vocab_size: int) -> dict:
    """The mask as bools: of the given tokens, and of the last."""
    allowed = torch.zeros(vocab_size, dtype=torch.bool)
    allowed[[*row["mask"], vocab_size - 1]] = True
    return {**row, "mask": allowed}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [12, 5000])
def test_adjusted_logits_equal_the_definition(vocab_size: int, dtype: torch.dtype) -> None:
    prompt, output = [1, 2, 2, 3], [3, 4, 4, 4, 5]
    asked = [*PENALIZED.values(), *(with_mask(row, vocab_size) for row in MASKED.values())]
    sequences = [[0], prompt + output, prompt, *[prompt + output] * (len(asked) - 1)]
    rows = {entry + 2: {"num_prompt_tokens": 4, **row} for entry, row in enumerate(asked)}
    logits = (torch.randn(len(sequences), vocab_size) * 3).to(dtype)
    found = adjusted(logits, rows, sequences)
    for place, (entry, row) in enumerate(rows.items()):
        expected = naive_adjust(logits[entry], token_ids=sequences[entry], **row)
        torch.testing.assert_close(found[place], expected, rtol=1e-6, atol=1e-6)
        if "mask" in row:
            assert found[place][~row["mask"]].isneginf().all()


def test_adjusted_rows_replace_what_was_chosen_for_them_and_keep_the_largest_raw_logit() -> None:
    """As a step does it: all rows from raw logits, then a few again from adjusted ones."""
    logits = torch.randn(3, 40)
    logits[1, 5], logits[2, 6] = 20, 30
    columns = columns_of([GREEDY, Ask(top_k=3, draw=0.2), GREEDY])
    token_ids = torch.full((3, MAX_LEN), 5, dtype=torch.int32, device=DEVICE)
    out = torch.zeros(1, 3, dtype=torch.int32, device=DEVICE)
    largest = torch.zeros(1, 3, device=DEVICE)
    shared = {
        "columns": columns,
        "token_ids": token_ids,
        "out_token_ids": out,
        "slot": torch.zeros(1, dtype=torch.int32, device=DEVICE),
        "workspace": poisoned_workspace(3, 40),
    }
    sample_rows(logits.to(DEVICE), out_largest=largest, **shared)
    assert out[0, 1:].tolist() == [5, 6]
    again = logits[1:2].clone()
    again[0, 5] = -torch.inf
    again[0, 9] = 25
    index = torch.tensor([1], dtype=torch.int32, device=DEVICE)
    sample_rows(again.to(DEVICE), out_largest=None, index=index, **shared)
    assert out[0].tolist() == [int(logits[0].argmax()), 9, 6]
    assert largest[0].tolist() == logits.max(1).values.tolist()
    assert int(token_ids[columns.rows[1], columns.positions[1]]) == 9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_top", [0, 3, 20])
@pytest.mark.parametrize("vocab_size", [21, 9_001] + [128_256, 151_936] * GPU)
def test_logprobs_equal_the_definition(vocab_size: int, num_top: int, dtype: torch.dtype) -> None:
    logits = torch.cat((torch.randn(2, vocab_size) * 4, rows_like("tied", 2, vocab_size, torch.float32)))
    logits = logits.to(dtype)
    logits[3, 0] = -torch.inf
    chosen = torch.randint(1, vocab_size, (NUM_SLOTS, 4), dtype=torch.int32)
    index = [2, -1, 0, 3]
    out = Logprobs(
        torch.full((5,), torch.nan, device=DEVICE),
        torch.full((5, 22), -7, dtype=torch.int32, device=DEVICE),
        torch.full((5, 22), torch.nan, device=DEVICE),
    )
    found = gather_logprobs(
        logits.to(DEVICE),
        index=torch.tensor(index, dtype=torch.int32, device=DEVICE),
        chosen=chosen.to(DEVICE),
        slot=torch.tensor([2], dtype=torch.int32, device=DEVICE),
        num_top=num_top,
        workspace=LogprobsWorkspace.allocate(4, vocab_size, DEVICE),
        out=out,
    )
    assert found.top_ids.shape == found.top_logprobs.shape == (4, num_top)
    assert out.sampled[[1, 4]].isnan().all()
    assert (out.top_ids[:, num_top:] == -7).all()
    for place, entry in enumerate(index):
        if entry < 0:
            continue
        sampled, ids, values = naive_logprobs(logits[entry], int(chosen[2, entry]), num_top)
        assert float(found.sampled[place]) == pytest.approx(sampled, rel=1e-6, abs=2e-6)
        assert found.top_ids[place].tolist() == ids.tolist()
        torch.testing.assert_close(found.top_logprobs[place].cpu(), values.float(), rtol=1e-6, atol=2e-6)


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_a_captured_step_samples_what_its_arrays_hold_when_it_is_replayed() -> None:
    logits = rows_like("peaked", 12, 128_256, torch.bfloat16).to(DEVICE)
    columns = columns_of([GREEDY] * 12)
    token_ids = torch.zeros(12, MAX_LEN, dtype=torch.int32, device=DEVICE)
    out = torch.zeros(NUM_SLOTS, 12, dtype=torch.int32, device=DEVICE)
    largest = torch.zeros(NUM_SLOTS, 12, device=DEVICE)
    slot = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    arguments = {
        "columns": columns,
        "token_ids": token_ids,
        "out_token_ids": out,
        "out_largest": largest,
        "slot": slot,
        "workspace": poisoned_workspace(12, 128_256),
    }
    sample_rows(logits, **arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample_rows(logits, **arguments)
    asks = with_random_draws(FILTERS)
    fresh = columns_of([*asks[:11], None])
    for field in fields(columns):
        getattr(columns, field.name).copy_(getattr(fresh, field.name))
    logits.copy_(rows_like("random", 12, 128_256, torch.bfloat16))
    slot.fill_(2)
    out.fill_(-7)
    graph.replay()
    tokens = out[2].tolist()
    assert (out[:2] == -7).all()
    assert tokens[11] == -7
    assert all(explained(logits[i], asks[i], tokens[i]) for i in range(11))


MODULE = "engine.kernels.sampling"
COLUMN_TYPES = {"temperature": "*fp32", "top_k": "*i32", "top_p": "*fp32", "min_p": "*fp32", "rows": "*i32"}
CHUNK_TYPES = {"chunk_max": "*fp32", "chunk_sum": "*fp32", "chunk_argmax": "*i32", "group_max": "*fp32"}
RESULT_TYPES = {
    "draw": "*fp64", "positions": "*i32", "group_mass": "*fp32", "group_list": "*i32", "group_ties": "*i32",
    "token_ids": "*i32", "token_ids_stride": "i32", "out_token_ids": "*i32", "out_largest": "*fp32",
    "out_stride": "i32", "slot": "*i32",
}  # fmt: skip
VOCAB = {"VOCAB": 151_936, "NUM_CHUNKS": 19, "NUM_GROUPS": 1187, "CHUNK": 8192, "GROUP": 128}
PADDED = {"CHUNKS_PADDED": 32, "GROUPS_PADDED": 2048, "TILE_GROUPS": 32}
ROW_TYPES = {
    "index": "*i32",
    "rows": "*i32",
    "positions": "*i32",
    "token_ids": "*i32",
    "token_ids_stride": "i32",
}
LIST_TYPES = {
    "allowed_ids": "*i32", "allowed_offsets": "*i32", "masked_ids": "*i32", "masked_offsets": "*i32",
    "bias_ids": "*i32", "bias_values": "*fp32", "bias_offsets": "*i32",
}  # fmt: skip
PENALTY_TYPES = {f"{name}_penalty": "*fp32" for name in ("repetition", "presence", "frequency")}
TOP_TYPES = {
    "index": "*i32", "num_top": "i32", "chunk_max": "*fp32", "chunk_sum": "*fp32", "chunk_keys": "*i32",
    "chunk_ids": "*i32",
}  # fmt: skip
MERGE_TYPES = {
    "chosen": "*i32", "chosen_stride": "i32", "slot": "*i32", "sampled": "*fp32", "top_ids": "*i32",
    "top_logprobs": "*fp32", "top_ids_stride": "i32", "top_logprobs_stride": "i32",
}  # fmt: skip
FIRST = {"index": "*i32", **COLUMN_TYPES, **CHUNK_TYPES}
COMPILED = {
    "reduce": ("kernel:_reduce_chunks", FIRST, {**VOCAB, "HAS_INDEX": False}, 8),
    "choose": (
        "kernel:_choose_tokens",
        {**FIRST, **RESULT_TYPES},
        {**VOCAB, **PADDED, "SHIFT": 16, "HAS_INDEX": False, "HAS_LARGEST": True},
        16,
    ),
    "choose adjusted": (
        "kernel:_choose_tokens",
        {**FIRST, **RESULT_TYPES},
        {**VOCAB, **PADDED, "SHIFT": 0, "HAS_INDEX": True, "HAS_LARGEST": False},
        16,
    ),
    "count": (
        "adjust:_copy_and_count",
        {**ROW_TYPES, "adjusted": "*fp32", "counts": "*i32", "allowed_offsets": "*i32"}
        | {"num_prompt_tokens": "*i32", "mask_bits": "*i32", "mask_index": "*i32"},
        {"VOCAB": 151_936, "MASK_WORDS": 4748, "BLOCK": 2048, "HAS_PENALTIES": True},
        4,
    ),
    "bad words": (
        "adjust:_apply_bad_words",
        {**ROW_TYPES, "adjusted": "*fp32", "num_prompt_tokens": "*i32"}
        | {"word_ids": "*i32", "word_offsets": "*i32", "first_words": "*i32"},
        {"VOCAB": 151_936, "BLOCK": 128},
        4,
    ),
    "lists": (
        "adjust:_apply_lists",
        {"index": "*i32", "adjusted": "*fp32", **LIST_TYPES},
        {"VOCAB": 151_936, "BLOCK": 1024},
        4,
    ),
    "penalties": (
        "adjust:_apply_penalties",
        {**ROW_TYPES, **PENALTY_TYPES, "adjusted": "*fp32", "counts": "*i32"},
        {"VOCAB": 151_936, "BLOCK": 2048},
        4,
    ),
    "logprobs": (
        "logprobs:_reduce_chunks",
        TOP_TYPES,
        {"VOCAB": 151_936, "NUM_CHUNKS": 38, "CHUNK": 4096, "MAX_TOP": 32},
        4,
    ),
    "merge logprobs": (
        "logprobs:_merge_chunks",
        {**TOP_TYPES, **MERGE_TYPES},
        {"NUM_CHUNKS": 38, "CHUNKS_PADDED": 64, "MAX_TOP": 32},
        4,
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_for_hopper(name: str) -> None:
    """Raw logits are bf16; adjusted ones fp32."""
    kernel, signature, constants, num_warps = COMPILED[name]
    if name not in ("penalties", "bad words"):
        logits = "*fp32" if "adjusted" in name else "*bf16"
        signature = {**signature, "logits": logits, "logits_stride": "i32"}
    overlaps = kernel.startswith("kernel:")
    compile_it = compile_overlapping if overlaps else compile_for_hopper
    sizes = compile_it(f"{MODULE}.{kernel}", signature, constants, num_warps=num_warps)
    assert sizes["shared"] <= 227 * 1024
