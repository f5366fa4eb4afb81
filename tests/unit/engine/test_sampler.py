"""Sampling: each parameter against a naive reference, and what makes draws reproducible."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engine.dispatch.sampling import SamplingRecord
from engine.sampling.generator import uniforms
from engine.sampling.parameters import SamplingTable
from engine.sampling.sampler import Sampled, sample

MAX_LEN = 64


def run(
    logits: torch.Tensor,
    records: list[SamplingRecord],
    *,
    tokens: list[list[int]] | None = None,
    num_prompt_tokens: int = 1,
) -> Sampled:
    """Samples one token per row of [S, vocab]; each request's sequence so far defaults to [0]."""
    sequences = tokens or [[0]] * len(records)
    table = SamplingTable(len(records))
    # What lies past a sequence's end is left over from another request and must not matter.
    rows = torch.full((len(records), MAX_LEN), logits.shape[1] - 1)
    for row, (record, sequence) in enumerate(zip(records, sequences, strict=True)):
        table.set(row, record, num_prompt_tokens)
        rows[row, : len(sequence)] = torch.tensor(sequence)
    positions = np.array([len(sequence) for sequence in sequences])
    return sample(logits, table.select(np.arange(len(records)), positions), rows)


def frequencies(logits: list[float], draws: int = 20_000, **parameters: float) -> np.ndarray:
    """How often each token is drawn from these logits under one set of parameters and many seeds."""
    records = [SamplingRecord(seed=seed, **parameters) for seed in range(draws)]
    sampled = run(torch.tensor(logits).repeat(draws, 1), records)
    return np.bincount(sampled.token_ids.numpy(), minlength=len(logits)) / draws


LOGITS = [1.0, 3.0, 2.0, 0.0, 2.5, -1.0]


def softmax(logits: list[float], keep: set[int] | None = None) -> np.ndarray:
    weights = np.exp(np.array(logits))
    if keep is not None:
        weights[[i for i in range(len(logits)) if i not in keep]] = 0
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, softmax(LOGITS)),
        ({"temperature": 2.0}, softmax([x / 2 for x in LOGITS])),
        ({"top_k": 2}, softmax(LOGITS, {1, 4})),
        ({"top_k": 100}, softmax(LOGITS)),
        # Probabilities in order: 0.448, 0.272, 0.165, ...
        ({"top_p": 0.5}, softmax(LOGITS, {1, 4})),
        ({"top_p": 0.8}, softmax(LOGITS, {1, 4, 2})),
        # Relative to the likeliest: 1, 0.61, 0.37, 0.14, ...
        ({"min_p": 0.5}, softmax(LOGITS, {1, 4})),
        # Of the two that top_k leaves, the first alone has 0.62.
        ({"top_k": 2, "top_p": 0.6}, softmax(LOGITS, {1})),
        ({"min_p": 0.3, "top_k": 5, "top_p": 0.99}, softmax(LOGITS, {1, 4, 2})),
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(parameters: dict, expected: np.ndarray) -> None:
    found = frequencies(LOGITS, **parameters)
    assert (found[expected == 0] == 0).all()
    np.testing.assert_allclose(found, expected, atol=0.015)


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [7.0, 7.0, 7.0, 7.0]])
    greedy = SamplingRecord(temperature=0.0)
    assert run(logits, [greedy, greedy]).token_ids.tolist() == [1, 0]
    biased = SamplingRecord(temperature=0.0, logit_bias=((3, 1.0),))
    assert run(logits, [biased, biased]).token_ids.tolist() == [1, 3]


def test_top_k_of_one_is_greedy_even_where_logits_are_equal() -> None:
    logits = torch.tensor([0.0, 5.0, 5.0, 1.0]).repeat(200, 1)
    records = [SamplingRecord(seed=seed, top_k=1) for seed in range(200)]
    assert set(run(logits, records).token_ids.tolist()) == {1}


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    sampled = run(torch.tensor([[80.0, 81.0, 79.0]]), [SamplingRecord(temperature=1e-6)])
    assert sampled.token_ids.tolist() == [1]


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_filters_of_a_large_vocabulary_keep_what_sorting_says(top_p: float, spread: float) -> None:
    """Flat and peaked rows together: some need more tokens than the first look takes, some fewer."""
    from engine.sampling.filters import filter_logits

    torch.manual_seed(1)
    logits = torch.randn(3, 5000) * torch.tensor([[spread], [spread * 4], [spread / 4]])
    top_k = torch.tensor([0, 2000, 40])
    kept = filter_logits(
        logits, top_k, torch.full((3,), top_p).double(), torch.tensor([0.0, 1e-4, 0.0]).double()
    )
    for row in range(3):
        order = sorted(range(5000), key=lambda i: (-float(logits[row, i]), i))
        weights = [math.exp(float(logits[row, i]) - float(logits[row, order[0]])) for i in order]
        allowed = [w for w in weights if w >= (1e-4 if row == 1 else 0)][: int(top_k[row]) or None]
        total, before, expected = sum(allowed), 0.0, set()
        for token_id, weight in zip(order, allowed, strict=False):
            if before < top_p * total:
                expected.add(token_id)
            before += weight
        found = set(kept[row].isfinite().nonzero().squeeze(1).tolist())
        # One token at the border may go either way by rounding.
        assert len(found ^ expected) <= 1


def test_the_same_seed_and_position_draw_the_same_in_any_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(12, 300)
    variety = [
        SamplingRecord(seed=i, temperature=0.5 + 0.2 * i, top_k=(0, 20)[i % 2], top_p=(1.0, 0.7)[i % 3 == 0])
        for i in range(12)
    ]
    sequences = [list(range(i + 1)) for i in range(12)]
    together = run(logits, variety, tokens=sequences).token_ids.tolist()
    alone = [run(logits[i : i + 1], [variety[i]], tokens=[sequences[i]]).token_ids.item() for i in range(12)]
    order = [7, 3, 11, 0]
    some = run(logits[order], [variety[i] for i in order], tokens=[sequences[i] for i in order])
    assert together == alone
    assert some.token_ids.tolist() == [alone[i] for i in order]


def test_uniforms_are_uniform_and_unrelated_between_neighbouring_seeds_and_positions() -> None:
    seeds, positions = np.meshgrid(np.arange(-100, 100), np.arange(200))
    draws = uniforms(seeds.ravel(), positions.ravel()).reshape(200, 200)
    assert 0 < draws.min() < draws.max() < 1
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    chi_square = ((counts - 2000) ** 2 / 2000).sum()
    assert chi_square < 43.8  # 0.1% of uniform samples exceed it at 19 degrees of freedom
    for a, b in ((draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02


def test_uniforms_are_those_of_splitmix64() -> None:
    """The first outputs of SplitMix64 from state 0 are published test vectors."""
    from engine.sampling.generator import GAMMA, mix64

    with np.errstate(over="ignore"):
        outputs = mix64(np.arange(1, 4, dtype=np.uint64) * GAMMA)
    assert [hex(x) for x in outputs] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


def test_penalties_equal_a_naive_reference() -> None:
    torch.manual_seed(3)
    vocab = 12
    prompt, output = [1, 2, 2, 3], [3, 4, 4, 4, 5]
    records = [
        SamplingRecord(temperature=0.0, repetition_penalty=1.7),
        SamplingRecord(temperature=0.0, presence_penalty=0.9, frequency_penalty=0.4),
        SamplingRecord(temperature=0.0, repetition_penalty=0.6, presence_penalty=-1, frequency_penalty=-0.5),
    ]
    for trial in range(50):
        logits = torch.randn(len(records), vocab, generator=torch.Generator().manual_seed(trial))
        found = run(logits, records, tokens=[prompt + output] * 3, num_prompt_tokens=len(prompt))
        for row, record in enumerate(records):
            expected = []
            for token_id, value in enumerate(logits[row].tolist()):
                if token_id in prompt + output:
                    value = (
                        value / record.repetition_penalty if value > 0 else value * record.repetition_penalty
                    )
                value -= record.frequency_penalty * output.count(token_id)
                value -= record.presence_penalty * (token_id in output)
                expected.append(value)
            assert int(found.token_ids[row]) == int(np.argmax(expected)), (trial, row)


def test_presence_and_frequency_do_not_count_the_prompt() -> None:
    logits = torch.tensor([[1.0, 0.9, 0.0]])
    record = SamplingRecord(temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0)
    assert run(logits, [record], tokens=[[0, 0]], num_prompt_tokens=2).token_ids.tolist() == [0]
    assert run(logits, [record], tokens=[[0, 0]], num_prompt_tokens=1).token_ids.tolist() == [1]


def test_only_allowed_tokens_are_drawn_whatever_their_logits() -> None:
    logits = torch.tensor([-50.0, 50.0, -60.0, 40.0]).repeat(50, 1)
    records = [SamplingRecord(seed=i, temperature=5.0, allowed_token_ids=(0, 2)) for i in range(50)]
    assert set(run(logits, records).token_ids.tolist()) <= {0, 2}


def test_stop_tokens_wait_for_min_tokens() -> None:
    logits = torch.tensor([[0.0, 9.0, 5.0]])
    record = SamplingRecord(temperature=0.0, min_tokens=2, masked_until_min_tokens=(1,))
    sequences = [[0], [0, 2], [0, 2, 2]]
    assert [run(logits, [record], tokens=[s]).token_ids.item() for s in sequences] == [2, 2, 1]


def test_a_request_allowed_only_stop_tokens_may_stop_before_min_tokens() -> None:
    record = SamplingRecord(
        temperature=0.0, min_tokens=5, masked_until_min_tokens=(1,), allowed_token_ids=(1,)
    )
    assert run(torch.zeros(1, 4), [record]).token_ids.tolist() == [1]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    torch.manual_seed(2)
    logits = torch.randn(3, 40) * 3
    records = [
        SamplingRecord(temperature=0.0, logprobs=3, logit_bias=((7, 100.0),)),
        SamplingRecord(temperature=0.0),
        SamplingRecord(temperature=3.0, top_k=2, logprobs=0, repetition_penalty=2.0),
    ]
    sampled = run(logits.clone(), records)
    raw = torch.log_softmax(logits, dim=-1)
    assert sampled.logprobs is not None
    assert sampled.logprobs.index.tolist() == [0, 2]
    assert sampled.token_ids[0] == 7
    expected = torch.stack([raw[0, 7], raw[2, sampled.token_ids[2]]])
    torch.testing.assert_close(sampled.logprobs.sampled, expected)
    assert sampled.logprobs.top_ids[0].tolist() == raw[0].topk(3).indices.tolist()
    torch.testing.assert_close(sampled.logprobs.top_logprobs[0], raw[0].topk(3).values)


def test_sampling_leaves_the_logits_as_they_were() -> None:
    logits = torch.randn(2, 10)
    before = logits.clone()
    run(logits, [SamplingRecord(top_k=3, presence_penalty=1.0), SamplingRecord(temperature=0.0)])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("record", [SamplingRecord(temperature=0.0), SamplingRecord(top_p=0.5)], ids=str)
def test_logits_that_are_not_finite_are_noticed(bad: float, record: SamplingRecord) -> None:
    logits = torch.zeros(2, 8)
    logits[1, 5] = bad
    sampled = run(logits, [record, record])
    assert sampled.largest.isfinite().tolist() == [True, False]
    assert ((sampled.token_ids >= 0) & (sampled.token_ids < 8)).all()
