"""Log probabilities of prompts and pooled hidden states are those of transformers' forward, in whatever
chunks a prompt is computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import WorkerConfig
from engine.cpu import prompt_states
from engine.cpu.runner import CpuModelRunner
from engine.dispatch.records import NewRequest, StepPlan
from engine.dispatch.sampling import Pooling, SamplingRecord, u32
from engine.worker.build import build_worker
from tests.integration.plan_driver import GREEDY, DrivenRequest, PlanDriver
from tests.unit.engine.tiny_model import write_model

PROMPTS = [[5, 9, 33, 7, 21, 60, 3, 3, 8, 41], [1], list(range(3, 40)), [8, 8], list(range(60, 3, -2))]
BUDGETS = [(64, 0), (7, 1), (1, 0)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def built(directory: Path) -> CpuModelRunner:
    config = WorkerConfig(
        model=str(directory),
        socket=Path("unused"),
        device="cpu",
        dtype="float32",
        num_blocks=80,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_model_len=128,
    )
    return build_worker(config).runner


@pytest.fixture
def runner(built: CpuModelRunner, monkeypatch: pytest.MonkeyPatch) -> CpuModelRunner:
    built.reset()
    monkeypatch.setattr(prompt_states, "POSITIONS_AT_ONCE", 4)
    return built


@pytest.fixture(scope="module")
def references(directory: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(log probabilities after each position, final hidden states) of each prompt, from transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    outputs = []
    with torch.inference_mode():
        for prompt in PROMPTS:
            out = model(torch.tensor([prompt]), output_hidden_states=True)
            outputs.append((out.logits[0].log_softmax(-1), out.hidden_states[-1][0]))
    return outputs


def told(request: DrivenRequest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All that steps told of a request's prompt; checks that every token was told of once, in order."""
    firsts = [entry.first for entry in request.prompt_logprobs]
    counts = [len(entry.logprobs) for entry in request.prompt_logprobs]
    assert firsts == [1 + sum(counts[:i]) for i in range(len(counts))]
    parts = [(entry.logprobs, entry.top_ids, entry.top_logprobs) for entry in request.prompt_logprobs]
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize(("budget", "steps_ahead"), BUDGETS)
def test_prompt_logprobs_are_those_of_transformers(
    runner: CpuModelRunner, references: list, budget: int, steps_ahead: int
) -> None:
    num_top = [3, 5, 0, -1, 20]
    records = [replace(GREEDY, prompt_logprobs=top, logprobs=top) for top in num_top]
    driver = PlanDriver(runner, budget=budget, steps_ahead=steps_ahead)
    requests = driver.generate(PROMPTS, 3, records)
    for request, prompt, top, (logprobs, _) in zip(requests, PROMPTS, num_top, references, strict=True):
        assert len(request.output) == 3
        if top < 0 or len(prompt) == 1:
            assert request.prompt_logprobs == []
            continue
        found, top_ids, top_logprobs = told(request)
        expected = logprobs[:-1]
        targets = torch.tensor(prompt[1:])
        torch.testing.assert_close(
            torch.from_numpy(found), expected.gather(1, targets[:, None])[:, 0], rtol=0, atol=2e-5
        )
        assert top_ids.shape == (len(prompt) - 1, top)
        best = expected.topk(top)
        assert top_ids.tolist() == best.indices.tolist()
        torch.testing.assert_close(torch.from_numpy(top_logprobs), best.values, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("budget", "steps_ahead"), BUDGETS)
def test_pooled_states_are_those_of_transformers(
    runner: CpuModelRunner, references: list, budget: int, steps_ahead: int
) -> None:
    kinds = [Pooling.LAST, Pooling.MEAN, Pooling.MEAN, Pooling.CLS, Pooling.CLS]
    for turn in range(3):  # rows are taken again, and must begin anew
        driver = PlanDriver(runner, budget=budget, steps_ahead=steps_ahead)
        requests = [
            driver.add(prompt, 1, SamplingRecord(pooling=kinds[(i + turn) % len(kinds)]))
            for i, prompt in enumerate(PROMPTS)
        ]
        generating = driver.add([4, 4], 3)
        driver.run()
        assert len(generating.output) == 3
        for request, (_, hidden) in zip(requests, references, strict=True):
            assert request.output == []
            expected = {Pooling.LAST: hidden[-1], Pooling.MEAN: hidden.mean(0), Pooling.CLS: hidden[0]}
            assert request.pooled is not None
            torch.testing.assert_close(
                torch.from_numpy(request.pooled), expected[request.sampling.pooling], rtol=0, atol=2e-5
            )
        runner.reset()


def test_a_resumed_request_tells_of_its_prompt_alone(runner: CpuModelRunner) -> None:
    record = replace(GREEDY, prompt_logprobs=2)
    prompt = PROMPTS[0]
    [whole] = PlanDriver(runner).generate([prompt], 8, record)
    runner.reset()
    driver = PlanDriver(runner, budget=4)
    again = driver.add(prompt + whole.output[:5], 3, record)
    again.num_prompt_tokens = len(prompt)
    driver.run()
    assert again.output == whole.output[5:]
    for found, expected in zip(told(again), told(whole), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


def one_request(sampling: SamplingRecord, **changes: object) -> StepPlan:
    prompt = PROMPTS[0]
    request = NewRequest(3, u32(prompt), len(prompt), u32([11]), sampling)
    ones = {"rows": u32([3]), "starts": u32([0]), "counts": u32([len(prompt)]), "samples": u32([0])}
    plan = StepPlan(0, u32([3]), [request], **ones, num_new_blocks=u32([0]), new_block_ids=u32([]))
    return replace(plan, **changes)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (one_request(SamplingRecord(pooling=Pooling.LAST), samples=u32([1])), "must sample exactly"),
        (
            one_request(SamplingRecord(pooling=Pooling.MEAN), starts=u32([2]), counts=u32([8])),
            "must compute all of its prompt",
        ),
        (
            one_request(SamplingRecord(pooling=Pooling.CLS), starts=u32([1]), counts=u32([9])),
            "must compute all of its prompt",
        ),
    ],
    ids=["samples", "mean", "cls"],
)
def test_a_plan_that_cannot_be_pooled_is_an_error(
    runner: CpuModelRunner, plan: StepPlan, message: str
) -> None:
    assert message in runner.launch(plan).result().error
    result = runner.launch(one_request(SamplingRecord(pooling=Pooling.MEAN))).result()
    assert (result.error, list(result.pooled)) == ("", [0])


def test_more_than_a_result_holds_is_an_error(
    runner: CpuModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = replace(runner.rows.limits)
    monkeypatch.setattr(runner.rows, "limits", limits)
    object.__setattr__(limits, "max_prompt_logprobs", 8)
    object.__setattr__(limits, "max_pooled", 0)
    result = runner.launch(one_request(replace(GREEDY, prompt_logprobs=0), samples=u32([1]))).result()
    assert "log probabilities of 9 prompt tokens; at most 8" in result.error
    result = runner.launch(one_request(SamplingRecord(pooling=Pooling.LAST))).result()
    assert "ends 1 pooled prompts; at most 0" in result.error


def test_prompt_logits_that_are_not_finite_are_an_error(
    runner: CpuModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = runner.model.compute_logits
    with monkeypatch.context() as patch:
        patch.setattr(runner.model, "compute_logits", lambda *given: compute(*given).fill_(torch.nan))
        plan = one_request(replace(GREEDY, prompt_logprobs=0), counts=u32([4]))
        assert runner.launch(plan).result().error == "the model's logits are not finite"
    plan = one_request(replace(GREEDY, prompt_logprobs=0), counts=u32([4]))
    assert runner.launch(plan).result().error == ""
