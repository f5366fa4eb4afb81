"""Draft tokens on the device against their definition, from rows whose unused part would be noticed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.kernels.speculation.kernel import accept_drafts, prepare_slots, propose_ngrams
from engine.kernels.speculation.naive import naive_accept, naive_ngram, naive_slots
from engine.sampling.generator import uniforms
from engine.speculation import ngram
from engine.speculation.accept import count_gained
from tests.kernels.hopper import compile_for_hopper

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODULE = "engine.kernels.speculation.kernel"
BLOCK_SIZE, MAX_LEN, MAX_PREDICTION = 4, 40, 24
POISON = -77


def int32(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def ngram_cases(count: int) -> list[tuple[list[int], list[int], int]]:
    """(tokens, prediction, output tokens) of a small vocabulary, so that runs are often found."""
    random = np.random.default_rng(1)
    cases = []
    for _ in range(count):
        length = int(random.integers(1, 30))
        tokens = random.integers(0, 3, length).tolist()
        prediction = random.integers(0, 3, int(random.integers(0, MAX_PREDICTION))).tolist()
        cases.append((tokens, prediction if random.random() < 0.6 else [], int(random.integers(0, length))))
    return cases


@pytest.mark.parametrize(("least", "most", "count"), [(1, 1, 3), (2, 3, 4), (1, 4, 9), (3, 5, 2)])
def test_the_host_proposes_what_is_defined(least: int, most: int, count: int) -> None:
    num_found = 0
    for tokens, prediction, num_outputs in ngram_cases(300):
        arrays = np.array(tokens, np.int64), np.array(prediction, np.int64)
        found = ngram.propose(*arrays, num_outputs, least=least, most=most, count=count).tolist()
        expected = naive_ngram(tokens, prediction, num_outputs, least=least, most=most, count=count)
        assert found == expected, (tokens, prediction, num_outputs)
        num_found += bool(found)
    assert 50 < num_found < 300


def test_what_follows_a_run_is_proposed_and_repeats_where_it_is_short() -> None:
    def propose(tokens: list[int], prediction: list[int], num_outputs: int = 0) -> list[int]:
        arrays = np.array(tokens), np.array(prediction, np.int64)
        return ngram.propose(*arrays, num_outputs, least=2, most=3, count=4).tolist()

    assert propose([7, 8, 9, 1, 2, 3, 7, 8], []) == [9, 1, 2, 3]
    assert propose([7, 8, 1, 7, 8, 2, 7, 8], []) == [2, 7, 8, 2], "the newest place, again and again"
    assert propose([7, 8, 1, 7, 9, 8], []) == []
    assert propose([7, 8, 1, 7, 8], [4, 7, 8, 6]) == [6], "the prediction, where the runs are as long"
    assert propose([5, 5, 1], [1, 2, 3], 1) == [2, 3], "the output is the prediction's beginning"


@pytest.mark.parametrize(("least", "most"), [(2, 3), (1, 4)])
def test_the_device_proposes_the_same(least: int, most: int) -> None:
    cases = ngram_cases(14)
    sizes = [1 + i % 6 for i in range(len(cases))]
    room = [len(tokens) + 1 + i % 4 for i, (tokens, _, _) in enumerate(cases)]
    token_ids = torch.full((len(cases) + 1, MAX_LEN), POISON, dtype=torch.int32)
    predictions = torch.full((len(cases) + 1, MAX_PREDICTION), POISON, dtype=torch.int32)
    for row, (tokens, prediction, _) in enumerate(cases):
        token_ids[row, : len(tokens)] = torch.tensor(tokens)
        predictions[row, : len(prediction)] = torch.tensor(prediction, dtype=torch.int32)
    before = token_ids.clone()
    token_ids, predictions = token_ids.to(DEVICE), predictions.to(DEVICE)
    rows = [row for row, size in enumerate(sizes) for _ in range(size)] + [-1]
    offsets = [offset for size in sizes for offset in range(size)] + [0]
    next_drafts = torch.full((len(rows) + 3,), POISON, dtype=torch.int32, device=DEVICE)
    propose_ngrams(
        int32(rows),
        int32(offsets),
        int32([size for size in sizes for _ in range(size)] + [1]),
        int32([room[row] for row in rows]),
        int32([len(tokens) for tokens, _, _ in cases] + [0]),
        token_ids,
        predictions,
        int32([len(prediction) for _, prediction, _ in cases] + [0]),
        int32([len(tokens) - outputs for tokens, _, outputs in cases] + [0]),
        next_drafts,
        least=least,
        most=most,
    )
    expected = []
    for row, (tokens, prediction, outputs) in enumerate(cases):
        count = min(sizes[row] - 1, room[row] - len(tokens))
        drafts = []
        if count > 0:
            drafts = naive_ngram(tokens, prediction, outputs, least=least, most=most, count=count)
        expected += [*drafts, *[-1] * (sizes[row] - len(drafts))]
        before[row, len(tokens) : len(tokens) + len(drafts)] = torch.tensor(drafts, dtype=torch.int32)
    assert next_drafts.tolist() == [*expected, -1, POISON, POISON, POISON]
    assert token_ids.cpu().tolist() == before.tolist()
    assert sum(draft >= 0 for draft in expected) > 5


@pytest.mark.parametrize("slots", [torch.int32, torch.int64])
def test_slots_are_laid_out_and_get_their_random_numbers(slots: torch.dtype) -> None:
    # Two drafts of three; none; a row without room; padding; then a chunk.
    rows, offsets = [2, 2, 2, 2, 0, 1, 1, -1, 3], [0, 1, 2, 3, 0, 0, 1, 0, 0]
    room, num_decodes = [30, 30, 30, 30, 30, 9, 9, 0, 0], 8
    next_drafts = [5, 6, -1, -1, -1, 7, -1, -1, 99]
    lengths, seeds = [4, 10, 7, 3], [3, 3, 3, 3, -9, 1, 1, 0, 0]
    token_ids = torch.randint(10, 100, (4, MAX_LEN), dtype=torch.int32)
    block_table = torch.randperm(40, dtype=torch.int32).view(4, 10)
    num_slots = len(rows)
    outputs = {
        name: torch.full((num_slots,), POISON, dtype=torch.int32, device=DEVICE)
        for name in ("input_ids", "positions", "seq_lens", "slot_rows")
    }
    outputs["slot_mapping"] = torch.full((num_slots,), POISON, dtype=slots, device=DEVICE)
    draws = torch.zeros(num_slots, dtype=torch.float64, device=DEVICE)
    drafts_on_device = int32(next_drafts)
    prepare_slots(
        int32(rows),
        int32(offsets),
        int32(room),
        torch.tensor(seeds, dtype=torch.int64, device=DEVICE),
        drafts_on_device,
        int32(lengths),
        token_ids.to(DEVICE),
        block_table.to(DEVICE),
        block_size=BLOCK_SIZE,
        num_decodes=num_decodes,
        **outputs,
        draws=draws,
    )
    expected = naive_slots(
        rows[:num_decodes],
        offsets[:num_decodes],
        room,
        next_drafts,
        token_ids.tolist(),
        block_table.tolist(),
        [*lengths, 0],
        block_size=BLOCK_SIZE,
    )
    for name in ("input_ids", "positions", "slot_mapping", "seq_lens"):
        assert outputs[name].tolist() == [*getattr(expected, name), POISON], name
    assert outputs["slot_rows"].tolist() == [*expected.rows, 3]
    assert expected.rows == [2, 2, 2, -1, 0, -1, -1, -1]
    assert drafts_on_device.tolist() == [*next_drafts[:num_decodes], -1]
    real = [i for i in range(num_decodes) if expected.rows[i] >= 0]
    wanted = uniforms(np.array(seeds)[real], np.array(expected.seq_lens)[real])
    assert draws.cpu().numpy()[real].tolist() == wanted.tolist()
    assert draws[num_decodes] == 0


def test_rows_gain_the_drafts_that_were_sampled_and_one_token_more() -> None:
    # All accepted; the second not; none proposed; none gained; not sampling; a chunk.
    groups = [([5, 6, 7], [5, 6, -1]), ([5, 9, 7, 1], [5, 6, 7, -1]), ([8, 9], [-1, -1]), ([3], [-1])]
    groups += [([4], [-1]), ([2], [-1])]
    rows, bases = [3, 0, 1, 2, -1, 4], [10, 20, 7, 0, 5, 12]
    sizes = [len(sampled) for sampled, _ in groups]
    num_slots = sum(sizes)
    seq_lens = [base + i if base else 0 for base, size in zip(bases, sizes, strict=True) for i in range(size)]
    token_ids = torch.full((5, MAX_LEN), POISON, dtype=torch.int32, device=DEVICE)
    results = torch.full((2, 3, num_slots + 2), POISON, dtype=torch.int32, device=DEVICE)
    results[1, 0, :num_slots] = int32([token for sampled, _ in groups for token in sampled])
    lengths = int32([1, 2, 3, 4, 5])
    arguments = {
        "sampling_rows": int32([row for row, size in zip(rows, sizes, strict=True) for _ in range(size)]),
        "offsets": int32([offset for size in sizes for offset in range(size)]),
        "group_sizes": int32([size for size in sizes for _ in range(size)]),
        "seq_lens": int32(seq_lens),
        "next_drafts": int32([draft for _, drafts in groups for draft in drafts]),
        "lengths": lengths,
        "token_ids": token_ids,
        "out_token_ids": results[:, 0],
        "out_counts": results[:, 1],
        "out_drafts": results[:, 2],
        "slot": int32([1]),
    }
    accept_drafts(**arguments)
    firsts = np.cumsum([0, *sizes])[:-1].tolist()
    known = lengths.tolist()
    for first, row, base, (sampled, drafts) in zip(firsts, rows, bases, groups, strict=True):
        if row < 0:
            continue
        gained, num_drafts = naive_accept(sampled, drafts) if base else ([], 0)
        assert results[1, 1, first] == len(gained)
        assert results[1, 2, first] == num_drafts
        assert token_ids[row, base : base + len(gained)].tolist() == gained
        assert (token_ids[row] != POISON).sum() == len(gained)
        assert known[row] == (base + len(gained) if base else row + 1)
    assert (results[0] == POISON).all()
    assert (results[1, 1:] != POISON).sum() == 2 * 5
    every = count_gained(
        np.array([draft for _, drafts in groups for draft in drafts]),
        np.array([token for sampled, _ in groups for token in sampled]),
        np.array(sizes),
    )
    assert every.tolist() == [len(naive_accept(*group)[0]) for group in groups]
    accept_drafts(**arguments, acceptance=1.0)
    assert [int(results[1, 1, first]) for first in firsts[:3]] == [3, 4, 1], "whatever was sampled"
    accept_drafts(**arguments, acceptance=0.0)
    assert [int(results[1, 1, first]) for first in firsts[:3]] == [1, 1, 1]


def test_the_host_counts_what_requests_gain_and_skips_those_that_gain_nothing() -> None:
    drafts, sampled = np.array([4, 5, -1, 6, -1, -1]), np.array([4, 5, 9, 7, 8, 8])
    assert count_gained(drafts, sampled, np.array([3, 0, 2, 1])).tolist() == [3, 0, 1, 1]
    assert count_gained(drafts[:0], sampled[:0], np.array([0, 0])).tolist() == [0, 0]


POINTERS = {
    "propose": """rows offsets group_sizes room lengths token_ids predictions prediction_lengths
        prompt_lengths next_drafts""",
    "slots": """rows offsets room next_drafts lengths token_ids block_table input_ids positions slot_mapping
        seq_lens slot_rows""",
    "accept": """sampling_rows offsets group_sizes seq_lens next_drafts lengths token_ids out_token_ids
        out_counts out_drafts slot""",
}
INTEGERS = {
    "propose": "token_ids_stride predictions_stride",
    "slots": "num_slots num_decodes token_ids_stride block_table_stride",
    "accept": "out_stride token_ids_stride",
}


@pytest.mark.parametrize("is_test", [False, True])
@pytest.mark.parametrize(
    ("name", "constants", "num_warps"),
    [
        ("propose", {"LEAST": 2, "MOST": 5, "BLOCK": 2048, "MAX_SLOTS": 32}, 8),
        ("slots", {"BLOCK_SIZE": 16, "BLOCK": 128}, 4),
        ("accept", {"MAX_SLOTS": 32}, 1),
    ],
)
def test_the_kernels_compile_for_hopper(
    name: str, constants: dict[str, int], num_warps: int, is_test: bool
) -> None:
    signature = dict.fromkeys(POINTERS[name].split(), "*i32") | dict.fromkeys(INTEGERS[name].split(), "i32")
    if name == "slots":
        signature |= {"seeds": "*i64", "draws": "*fp64"}
    else:
        constants = constants | {"IS_TEST": is_test}
    if name == "accept":
        signature["acceptance"] = "fp32"
    sizes = compile_for_hopper(f"{MODULE}:{name}_kernel", signature, constants, num_warps=num_warps)
    assert sizes["shared"] < 227 << 10
