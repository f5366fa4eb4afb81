"""Requests with draft tokens get what they get without, token for token, whatever else they ask for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.dispatch.sampling import SamplingRecord, u32
from engine.worker.build import MakePlatform
from scheduler.request import EndReason, Request
from tests.integration.core_driver import CoreDriver
from tests.integration.tiny_adapters import write_adapter
from tests.integration.tiny_families import write_tiny
from tests.unit.engine.tiny_model import write_model

GREEDY = SamplingRecord(temperature=0.0)
DRAFTS = 4
NGRAM = json.dumps({"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_min": 1})
# Some repeat themselves, one is of a token, one of more than a step takes.
PROMPTS = [[5, 9, 33, 5, 9, 33, 5, 9], [1], list(range(3, 23)) * 2, [8, 8, 8], [40, 2, 17, 40, 2]]
# Everything that changes what is sampled, by what came before or not.
RECORDS = [
    GREEDY,
    SamplingRecord(seed=1, temperature=0.4, top_p=0.9, logprobs=3),
    SamplingRecord(
        seed=2, temperature=0.6, repetition_penalty=1.3, frequency_penalty=0.3, top_k=7, logprobs=1
    ),
    SamplingRecord(temperature=0.0, logit_bias=((11, 3.0), (58, -5.0)), presence_penalty=-4.0, logprobs=0),
    SamplingRecord(
        seed=3,
        temperature=0.5,
        min_p=0.05,
        allowed_token_ids=tuple(range(20, 60)),
        min_tokens=6,
        masked_until_min_tokens=tuple(range(20, 40)),
        bad_words=((41, 42), (50,)),
    ),
]
LENGTHS = [24, 17, 30, 9, 26]
CPU: MakePlatform | None = None


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), head_dim=16, tie_word_embeddings=False)


def driver(directory: Path, platform: MakePlatform | None, **options: object) -> CoreDriver:
    values = {"max_num_seqs": 6, "max_num_batched_tokens": 32, "max_model_len": 80, "block_size": 4}
    made = CoreDriver(directory, platform, **{**values, "num_blocks": 120, **options})
    made.is_timed = False  # as many drafts as there may be, however busy this machine is
    return made


def compare(
    drafted: CoreDriver,
    plain: CoreDriver,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    lengths: int | Sequence[int] = tuple(LENGTHS),
    records: SamplingRecord | Sequence[SamplingRecord] = tuple(RECORDS),
) -> list[Request]:
    """Serves requests with drafts and without; returns those with."""
    results = [each.generate(prompts, lengths, records) for each in (plain, drafted)]
    for (expected, their_logprobs), (request, logprobs) in zip(*results, strict=True):
        assert request.token_ids.tolist() == expected.token_ids.tolist()
        assert request.end_reason is expected.end_reason
        assert len(logprobs) == len(their_logprobs)
        for mine, other in zip(logprobs, their_logprobs, strict=True):
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert list(mine.top_ids) == list(other.top_ids)
    return [request for request, _ in results[1]]


def check_counters(served: CoreDriver) -> None:
    counters = served.scheduler.counters
    assert 0 < counters.num_accepted_tokens < counters.num_draft_tokens
    assert sum(counters.num_accepted_at) == counters.num_accepted_tokens
    assert sorted(counters.num_accepted_at, reverse=True) == counters.num_accepted_at
    assert counters.num_drafts <= counters.num_draft_tokens <= DRAFTS * counters.num_drafts
    assert served.scheduler.pool.num_used == 0


def test_every_way_of_sampling_gives_the_same_tokens_with_drafts(directory: Path) -> None:
    drafted, plain = driver(directory, CPU, speculative_config=NGRAM), driver(directory, CPU)
    requests = compare(drafted, plain)
    check_counters(drafted)
    assert all(request.end_reason is EndReason.LENGTH for request in requests)
    counters = drafted.scheduler.counters
    assert 0 < sum(request.num_drafts for request in requests) <= counters.num_draft_tokens
    assert sum(request.num_accepted for request in requests) <= counters.num_accepted_tokens
    assert counters.num_steps < plain.scheduler.counters.num_steps
    # What they left in the prefix cache is right.
    compare(drafted, plain, [request.token_ids.tolist()[:-3] for request in requests], 8)


def test_few_blocks_preempt_requests_with_drafts(directory: Path) -> None:
    drafted = driver(directory, CPU, speculative_config=NGRAM, num_blocks=22)
    compare(drafted, driver(directory, CPU))
    assert drafted.scheduler.counters.num_preemptions > 0
    check_counters(drafted)


def test_stop_tokens_end_requests_among_their_drafts(directory: Path) -> None:
    drafted, plain = driver(directory, CPU, speculative_config=NGRAM), driver(directory, CPU)
    (free, _), *_ = plain.generate(PROMPTS[:1], 24, GREEDY)
    stops = frozenset(free.token_ids.tolist()[len(PROMPTS[0]) + 5 :][:1])
    results = [each.generate(PROMPTS, 24, GREEDY, stop_token_ids=stops) for each in (plain, drafted)]
    for (expected, _), (request, _) in zip(*results, strict=True):
        assert request.token_ids.tolist() == expected.token_ids.tolist()
        assert (request.end_reason, request.stop_token_id) == (expected.end_reason, expected.stop_token_id)
    assert any(request.end_reason is EndReason.STOP for request, _ in results[1])


def test_requests_end_where_the_model_does(directory: Path) -> None:
    """At max_model_len, which is the last token that a row can hold."""
    drafted, plain = (
        driver(directory, CPU, max_model_len=40, **more) for more in ({"speculative_config": NGRAM}, {})
    )
    requests = compare(drafted, plain, PROMPTS[:2], [32, 39], GREEDY)
    assert [len(request.token_ids) for request in requests] == [40, 40]


def test_a_prediction_that_comes_true_is_accepted_from_its_first_tokens_on(directory: Path) -> None:
    plain = driver(directory, CPU)
    prompt = list(range(3, 23))
    sampling = SamplingRecord(seed=5, temperature=1.0)
    ((expected, _),) = plain.generate([prompt], 30, sampling)
    output = expected.token_ids.tolist()[len(prompt) :]
    wrong = [*output[:12], 63, 63, *output[13:]]
    gains = []
    for prediction in ([], output, wrong):
        drafted = driver(directory, CPU, speculative_config=NGRAM)
        ((request, _),) = drafted.generate([prompt], 30, sampling, prediction=u32(prediction))
        assert request.token_ids.tolist() == expected.token_ids.tolist()
        gains.append(request.num_accepted)
    assert gains[0] < gains[2] < gains[1]
    assert gains[1] >= 20


def test_sampled_tokens_have_the_distribution_of_plain_ones(directory: Path) -> None:
    """Chi-square over pairs of tokens of a vocabulary of four; no request has the seed of another."""
    vocabulary, count = (20, 21, 22, 23), 300
    prompt = [*vocabulary, *vocabulary[::-1]]
    samples = []
    for config, first_seed in ((NGRAM, 10_000), (None, 0)):
        options = {"max_num_seqs": 32, "num_blocks": 400, "max_num_batched_tokens": 256}
        served = driver(directory, CPU, speculative_config=config, **options)
        records = [
            SamplingRecord(seed=first_seed + i, temperature=1.5, allowed_token_ids=vocabulary)
            for i in range(count)
        ]
        requests = [request for request, _ in served.generate([prompt] * count, 7, records)]
        samples.append([tuple(request.token_ids[-2:]) for request in requests])
        if config:
            assert served.scheduler.counters.num_accepted_tokens > count / 20
    outcomes = sorted({*samples[0], *samples[1]})
    observed = np.array([[sample.count(outcome) for outcome in outcomes] for sample in samples])
    rare = observed.sum(axis=0) < 10
    observed = np.column_stack([observed[:, ~rare], observed[:, rare].sum(axis=1)])
    expected = observed.sum(axis=0) / 2
    statistic = float((((observed - expected) ** 2) / expected).sum())
    freedom = observed.shape[1] - 1
    # The 99.9th percentile of chi-square, by Wilson and Hilferty.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < limit


def test_rows_with_adapters_have_drafts(tmp_path: Path) -> None:
    base = write_tiny("llama", tmp_path / "base")
    adapter = write_adapter(base, "all-linear", tmp_path / "adapter", seed=1)
    served = []
    for config in (NGRAM, None):
        made = driver(base, CPU, speculative_config=config, enable_lora=True, max_loras=2, max_lora_rank=16)
        made.load(7, adapter)
        served.append(made.generate(PROMPTS, 20, GREEDY, [7, 0, 7, 0, 7]))
        assert (made.scheduler.counters.num_accepted_tokens > 0) == (config is not None)
    for (request, _), (expected, _) in zip(*served, strict=True):
        assert request.token_ids.tolist() == expected.token_ids.tolist()


def test_a_request_alone_and_among_others_gets_the_same(directory: Path) -> None:
    drafted = driver(directory, CPU, speculative_config=NGRAM)
    together = [request.token_ids.tolist() for request, _ in drafted.generate(PROMPTS, LENGTHS, RECORDS)]
    alone = []
    for prompt, length, record in zip(PROMPTS, LENGTHS, RECORDS, strict=True):
        ((request, _),) = drafted.generate([prompt], length, replace(record))
        alone.append(request.token_ids.tolist())
    assert alone == together
