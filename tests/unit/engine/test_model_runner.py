"""The runner: plans it refuses, failures it survives, and what a request's row carries from step to step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import WorkerConfig
from engine.cpu.runner import CpuModelRunner
from engine.dispatch.records import NewRequest, StepPlan
from engine.dispatch.sampling import SamplingRecord, u32
from engine.worker.build import build_worker
from tests.integration.plan_driver import GREEDY, PlanDriver, plan_fork
from tests.unit.engine.tiny_model import write_model

PROMPT = [5, 9, 33, 7, 21, 60, 3]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> CpuModelRunner:
    directory = write_model(tmp_path_factory.mktemp("model"))
    config = WorkerConfig(
        model=str(directory),
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


def make_plan(**changes: object) -> StepPlan:
    """A valid first step of one request of seven tokens in row 3, changed as asked."""
    request = NewRequest(3, u32(PROMPT), len(PROMPT), u32([11]), GREEDY)
    valid = StepPlan(0, u32([]), [request], u32([3]), u32([0]), u32([7]), u32([1]), u32([0]), u32([]))
    return replace(valid, **changes)


def with_request(**changes: object) -> StepPlan:
    plan = make_plan()
    plan.new_requests = [replace(plan.new_requests[0], **changes)]
    return plan


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (make_plan(rows=u32([16])), "scheduled row must be below 16, got 16"),
        (make_plan(rows=u32([2])), "row 2 is not in use"),
        (make_plan(freed_rows=u32([16])), "freed row must be below 16, got 16"),
        (make_plan(counts=u32([8]), samples=u32([1])), "row 3 computes tokens beyond its end"),
        (make_plan(starts=u32([2**32 - 1])), "row 3 computes tokens beyond its end"),
        (make_plan(counts=u32([0]), samples=u32([0])), "row 3 computes no token"),
        (make_plan(counts=u32([6])), "row 3 must sample exactly at its last token"),
        (make_plan(samples=u32([0])), "row 3 must sample exactly at its last token"),
        (make_plan(counts=u32([65])), "computes 65 tokens; at most 64"),
        (make_plan(num_new_blocks=u32([1]), new_block_ids=u32([80])), "block id must be below 80, got 80"),
        (make_plan(num_new_blocks=u32([8]), new_block_ids=u32(range(8))), "at most 8, got 9"),
        (with_request(row=16), "row 16 must be below 16"),
        (with_request(block_ids=u32([])), "row 3 has too few blocks"),
        (with_request(block_ids=u32([80])), "block id must be below 80"),
        (with_request(block_ids=u32(range(9))), "has 9 blocks; at most 8"),
        (with_request(token_ids=u32([1, 64]), num_prompt_tokens=1), "token id must be below 64, got 64"),
        (with_request(token_ids=u32([])), "has 0 tokens; 1 to 128"),
        (with_request(token_ids=u32([1] * 129)), "has 129 tokens; 1 to 128"),
        (with_request(num_prompt_tokens=8), "has 7 tokens, 8 of them prompt"),
        (make_plan(copied_blocks=u32([(80, 1)])), "block id must be below 80, got 80"),
        (make_plan(copied_blocks=u32([(1, 80)])), "block id must be below 80, got 80"),
        (make_plan(copied_blocks=u32([(1, 3), (2, 3)])), "two blocks are copied to the same one"),
        (make_plan(copied_blocks=u32([(1, 2), (2, 3)])), "copied from and copied to in one step, got 2"),
        (make_plan(copied_blocks=u32([(1, 2 + i) for i in range(17)])), "17 blocks are copied; at most 16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_inconsistent_plan_is_an_error_and_the_next_plan_runs(
    runner: CpuModelRunner, plan: StepPlan, message: str
) -> None:
    result = runner.launch(plan).result()
    assert result.error.startswith("inconsistent plan: ")
    assert message in result.error
    assert runner.launch(make_plan(freed_rows=u32([3]))).result().error == ""


def test_a_copied_block_is_as_good_as_a_computed_one(runner: CpuModelRunner) -> None:
    results = []
    for copied in (True, False):
        runner.reset()
        results.append([runner.launch(plan).result() for plan in plan_fork(PROMPT, [40, 2], copied=copied)])
    (_, ours), (_, expected) = results
    assert ours.error == ""
    assert ours.token_ids.tolist() == expected.token_ids.tolist()
    assert ours.logprobs[0].top_logprobs == pytest.approx(expected.logprobs[0].top_logprobs, abs=1e-5)


def test_a_row_in_use_takes_no_second_request(runner: CpuModelRunner) -> None:
    assert runner.launch(make_plan()).result().error == ""
    assert "row 3 is in use" in runner.launch(make_plan()).result().error
    twice = make_plan(freed_rows=u32([3]), **{k: u32([v, v]) for k, v in (("rows", 3), ("starts", 0))})
    twice = replace(twice, counts=u32([7, 7]), samples=u32([1, 1]), num_new_blocks=u32([0, 0]))
    assert "scheduled twice" in runner.launch(twice).result().error


def test_a_full_row_cannot_sample(runner: CpuModelRunner) -> None:
    plan = with_request(token_ids=u32([1] * 128), block_ids=u32(range(8)))
    plan = replace(plan, starts=u32([100]), counts=u32([28]))
    assert "row 3 is full and cannot sample" in runner.launch(plan).result().error


def test_a_step_that_computes_nothing_only_frees_rows(runner: CpuModelRunner) -> None:
    runner.launch(make_plan())
    none = u32([])
    result = runner.launch(StepPlan(1, u32([3]), [], none, none, none, none, none, none)).result()
    assert (result.error, len(result.token_ids)) == ("", 0)
    assert runner.launch(make_plan()).result().error == ""


def test_an_exception_in_the_model_is_an_error_result(
    runner: CpuModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no memory for this step")

    with monkeypatch.context() as patch:
        patch.setattr(runner.model, "forward", fail)
        pending = runner.launch(make_plan())
        assert pending.done()
        assert pending.result().error == "MemoryError: no memory for this step"
    assert runner.launch(make_plan(freed_rows=u32([3]))).result().error == ""


def test_logits_that_are_not_finite_are_an_error_result(
    runner: CpuModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute: Callable[[torch.Tensor], torch.Tensor] = runner.model.compute_logits
    with monkeypatch.context() as patch:
        patch.setattr(runner.model, "compute_logits", lambda *given: compute(*given).fill_(torch.nan))
        assert runner.launch(make_plan()).result().error == "the model's logits are not finite"
    assert runner.launch(make_plan(freed_rows=u32([3]))).result().error == ""


def test_one_step_ahead_gives_the_same_tokens(runner: CpuModelRunner) -> None:
    prompts = [PROMPT[: 1 + i % 7] for i in range(10)]
    outputs = []
    for steps_ahead in (0, 1):
        runner.reset()
        driver = PlanDriver(runner, budget=16, steps_ahead=steps_ahead)
        outputs.append([request.output for request in driver.generate(prompts, 20)])
    assert outputs[0] == outputs[1]


VARIETY = [
    SamplingRecord(seed=i, temperature=1.5, top_p=(1.0, 0.9)[i % 2], presence_penalty=(0.0, 1.0)[i % 3 == 0])
    for i in range(8)
]


def test_seeded_tokens_are_the_same_alone_together_and_after_a_preemption(runner: CpuModelRunner) -> None:
    prompts = [PROMPT[: 1 + i % 7] for i in range(8)]
    together = PlanDriver(runner, budget=20).generate(prompts, 16, VARIETY)
    for prompt, record, expected in zip(prompts, VARIETY, together, strict=True):
        runner.reset()
        [alone] = PlanDriver(runner).generate([prompt], 16, record)
        assert alone.output == expected.output
        # Preempted after five tokens: it re-enters with them, still output as far as penalties go.
        runner.reset()
        driver = PlanDriver(runner)
        again = driver.add(prompt + expected.output[:5], 11, record)
        again.num_prompt_tokens = len(prompt)
        driver.run()
        assert again.output == expected.output[5:]


def test_penalties_see_the_output_grow(runner: CpuModelRunner) -> None:
    """A bias of 100 makes one token certain until enough penalties of 2 have been added up."""
    biased = SamplingRecord(temperature=0.0, logit_bias=((4, 100.0),))
    [always] = PlanDriver(runner).generate([PROMPT], 100, biased)
    runner.reset()
    [limited] = PlanDriver(runner).generate([PROMPT], 100, replace(biased, frequency_penalty=2.0))
    assert always.output == [4] * 100
    assert limited.output[:20] == [4] * 20
    assert set(limited.output) != {4}


def test_logprobs_come_with_the_token_they_belong_to(runner: CpuModelRunner) -> None:
    records = [GREEDY, replace(GREEDY, logprobs=2), GREEDY, replace(GREEDY, logprobs=0)]
    requests = PlanDriver(runner).generate([PROMPT[:n] for n in (1, 2, 3, 4)], 5, records)
    assert [len(request.logprobs) for request in requests] == [0, 5, 0, 5]
    for token_id, entry in zip(requests[1].output, requests[1].logprobs, strict=True):
        assert entry.top_ids[0] == token_id
        assert entry.logprob == pytest.approx(float(entry.top_logprobs[0]))
    assert all(len(entry.top_ids) == 0 for entry in requests[3].logprobs)


def test_results_say_how_long_a_step_took(runner: CpuModelRunner) -> None:
    started = time.monotonic()
    result = runner.launch(make_plan()).result()
    assert 0 < result.execute_us <= (time.monotonic() - started) * 1e6
