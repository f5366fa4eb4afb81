"""A masked token is never sampled, and a bad word is never completed, however tokens are drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import WorkerConfig
from engine.cpu.runner import CpuModelRunner
from engine.dispatch.records import NewRequest, StepPlan
from engine.dispatch.sampling import SamplingRecord, U32Array, u32
from engine.kernels.sampling.naive import naive_adjust
from engine.sampling.masks import mask_batch, pack_mask, unpack_mask
from engine.sampling.parameters import SamplingBatch, SamplingTable
from engine.sampling.penalties import apply_bad_words, apply_masks, apply_penalties, apply_token_lists
from engine.worker.build import build_worker
from tests.integration.plan_driver import GREEDY, PlanDriver
from tests.unit.engine.tiny_model import write_model

VOCAB = 64
PROMPT = [5, 9, 33, 7, 21, 60, 3]
DRAWN = SamplingRecord(temperature=1.5, seed=9)
HOT = SamplingRecord(temperature=1e300, seed=9)
RECORDS = {
    "greedy": GREEDY,
    "drawn": DRAWN,
    "hot": HOT,
    "filtered": SamplingRecord(temperature=0.8, top_p=0.9, top_k=20, seed=3),
    "penalized": SamplingRecord(temperature=0.0, repetition_penalty=100.0, frequency_penalty=2.0),
    "rewarded": SamplingRecord(temperature=0.0, repetition_penalty=0.01, presence_penalty=-2.0),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> CpuModelRunner:
    config = WorkerConfig(
        model=str(write_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=False)),
        socket=Path("unused"),
        device="cpu",
        dtype="float32",
        num_blocks=80,
        max_num_seqs=16,
        max_num_batched_tokens=64,
        max_model_len=128,
    )
    return build_worker(config).runner


@pytest.fixture
def runner(built: CpuModelRunner) -> CpuModelRunner:
    built.reset()
    return built


def allowing(token_ids: set[int]) -> U32Array:
    allowed = np.zeros(VOCAB, dtype=np.bool_)
    allowed[list(token_ids)] = True
    return pack_mask(allowed)


@given(st.sets(st.integers(0, 99)), st.integers(100, 170))
def test_bit_i_of_a_mask_is_token_i(token_ids: set[int], vocab_size: int) -> None:
    allowed = np.zeros(vocab_size, dtype=np.bool_)
    allowed[list(token_ids)] = True
    mask = pack_mask(allowed)
    assert len(mask) == -(-vocab_size // 32)
    assert {i for i in range(vocab_size) if int(mask[i // 32]) >> i % 32 & 1} == token_ids
    assert unpack_mask(mask, vocab_size).tolist() == allowed.tolist()


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_masked_token_is_never_sampled(runner: CpuModelRunner, name: str, steps_ahead: int) -> None:
    """Allowed are tokens that follow from the one before; other requests go on as if there were no mask."""
    alone = PlanDriver(runner).generate([PROMPT], 12, RECORDS[name])[0].output
    runner.reset()

    def allowed_after(output: list[int]) -> set[int]:
        last = output[-1] if output else 0
        return {(7 * last + 3) % VOCAB, (last + 31) % VOCAB}

    driver = PlanDriver(runner, budget=5, steps_ahead=steps_ahead)
    masked, free = (driver.add(PROMPT, 12, RECORDS[name]) for _ in range(2))
    masked.mask = lambda output: allowing(allowed_after(output))
    driver.run()
    assert free.output == alone
    for i, token_id in enumerate(masked.output):
        assert token_id in allowed_after(masked.output[:i])
    assert masked.output != alone


def test_a_mask_that_allows_one_token_decides(runner: CpuModelRunner) -> None:
    driver = PlanDriver(runner)
    requests = [driver.add(PROMPT, 6, record) for record in RECORDS.values()]
    wanted = [63, 0, 31, 32, 33, 5]
    for request in requests:
        request.mask = lambda output: allowing({wanted[len(output)]})
    driver.run()
    assert [request.output for request in requests] == [wanted] * len(requests)


def test_log_probabilities_of_a_masked_request_are_those_of_the_raw_logits(runner: CpuModelRunner) -> None:
    record = replace(GREEDY, logprobs=3)
    [free] = PlanDriver(runner).generate([PROMPT], 1, record)
    runner.reset()
    driver = PlanDriver(runner)
    masked = driver.add(PROMPT, 1, record)
    other = next(i for i in range(VOCAB) if i not in free.logprobs[0].top_ids)
    masked.mask = lambda _: allowing({other})
    driver.run()
    assert masked.output == [other]
    assert list(masked.logprobs[0].top_ids) == list(free.logprobs[0].top_ids)
    assert masked.logprobs[0].logprob < min(free.logprobs[0].top_logprobs)


def longest_run(output: list[int], word: tuple[int, ...]) -> bool:
    return any(tuple(output[i : i + len(word)]) == word for i in range(len(output)))


@pytest.mark.parametrize("name", RECORDS)
def test_a_bad_word_is_never_completed(runner: CpuModelRunner, name: str) -> None:
    """Each round forbids what the last one said: a token, then two in a row, then three."""
    words: list[tuple[int, ...]] = []
    said: list[list[int]] = []
    for length in (1, 2, 3, 2, 1):
        runner.reset()
        record = replace(RECORDS[name], bad_words=tuple(words))
        output = PlanDriver(runner, steps_ahead=1).generate([PROMPT], 12, record)[0].output
        assert not any(longest_run(output, word) for word in words)
        assert output not in said
        said.append(output)
        words.append(tuple(output[4 : 4 + length]))


def test_a_bad_word_that_begins_in_the_prompt_may_be_completed(runner: CpuModelRunner) -> None:
    [free] = PlanDriver(runner).generate([PROMPT], 4)
    runner.reset()
    record = replace(GREEDY, bad_words=((PROMPT[-1], free.output[0]),))
    [again] = PlanDriver(runner).generate([PROMPT], 4, record)
    assert again.output == free.output


def test_where_only_bad_words_are_left_the_mask_wins(runner: CpuModelRunner) -> None:
    for record in (GREEDY, DRAWN, HOT):
        runner.reset()
        driver = PlanDriver(runner)
        request = driver.add(PROMPT, 5, replace(record, bad_words=((40,), (41,))))
        request.mask = lambda _: allowing({40, 41})
        driver.run()
        assert set(request.output) <= {40, 41}


def test_other_limits_narrow_a_mask_unless_they_empty_it(runner: CpuModelRunner) -> None:
    record = replace(GREEDY, allowed_token_ids=(40, 41, 50), min_tokens=2, masked_until_min_tokens=(41,))
    cases = [({40, 41, 42}, [40]), ({41, 42}, [41]), ({50}, [50]), ({7}, [7])]
    for allowed, outcomes in cases:
        runner.reset()
        driver = PlanDriver(runner)
        request = driver.add(PROMPT, 1, record)
        request.mask = lambda _, allowed=allowed: allowing(allowed)
        driver.run()
        assert request.output[0] in outcomes


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_adjusted_logits_equal_the_definition(data: st.DataObject) -> None:
    ids = st.integers(0, 5)
    word = st.lists(ids, min_size=1, max_size=3).map(tuple)
    sequence = data.draw(st.lists(ids, min_size=1, max_size=8))
    num_prompt = data.draw(st.integers(1, len(sequence)))
    words = data.draw(st.lists(word, max_size=4))
    allowed = data.draw(st.none() | st.sets(ids, min_size=1))
    bias = data.draw(st.dictionaries(ids, st.floats(-5, 5, width=32), max_size=2))
    repetition = data.draw(st.sampled_from([1.0, 0.5, 2.0]))
    record = SamplingRecord(
        logit_bias=tuple(bias.items()), repetition_penalty=repetition, bad_words=tuple(words)
    )
    logits = torch.randn(1, VOCAB)
    table = SamplingTable(1)
    table.set(0, record, num_prompt)
    batch = table.select(np.zeros(1, dtype=np.int64), np.array([len(sequence)]))
    mask = None if allowed is None else torch.from_numpy(unpack_mask(allowing(allowed), VOCAB).copy())
    expected = naive_adjust(
        logits[0],
        token_ids=sequence,
        num_prompt_tokens=num_prompt,
        repetition_penalty=repetition,
        bias=bias,
        mask=mask,
        bad_words=[list(word) for word in words],
    )
    if allowed is not None:
        give_mask(batch, allowing(allowed))
    rows = torch.tensor([[*sequence, *[0] * (16 - len(sequence))]])
    found = logits.clone()
    apply_token_lists(found, batch)
    apply_masks(found, batch)
    apply_bad_words(found, batch, rows)
    apply_penalties(found, batch, rows)
    torch.testing.assert_close(found[0], expected)


def plan_of(masks: dict[int, U32Array], samples: int = 1) -> StepPlan:
    request = NewRequest(3, u32(PROMPT), len(PROMPT), u32([11]), GREEDY)
    count = len(PROMPT) if samples else 3
    one = {"rows": u32([3]), "starts": u32([0]), "counts": u32([count]), "samples": u32([samples])}
    return StepPlan(
        0, u32([3]), [request], **one, num_new_blocks=u32([0]), new_block_ids=u32([]), masks=masks
    )


def give_mask(batch: SamplingBatch, mask: U32Array) -> None:
    mask_batch(batch, plan_of({0: mask}), np.zeros(1, dtype=np.int64), VOCAB)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_of({0: u32([0, 0])}), "the mask of row 3 allows no token"),
        (plan_of({0: u32([1])}), "a mask has 1 words; it must have 2"),
        (plan_of({1: u32([1, 0])}), "request 1 of the step, which does not sample"),
        (plan_of({0: u32([1, 0])}, samples=0), "request 0 of the step, which does not sample"),
    ],
    ids=["empty", "short", "nobody", "chunk"],
)
def test_an_impossible_mask_is_an_error(runner: CpuModelRunner, plan: StepPlan, message: str) -> None:
    assert message in runner.launch(plan).result().error
    result = runner.launch(plan_of({0: u32([0, 1 << 31])})).result()
    assert (result.error, result.token_ids.tolist()) == ("", [63])
