"""The runner for GPUs gives the tokens of the runner for CPUs. Without a GPU its kernels are interpreted, and
CUDA graphs are left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import WorkerConfig
from engine.cpu.platform import CpuPlatform
from engine.cpu.runner import CpuModelRunner
from engine.cuda import prompt_states, sampling_extras
from engine.cuda.graphs import GraphSize
from engine.cuda.platform import CudaPlatform
from engine.cuda.runner import CudaModelRunner
from engine.dispatch.records import NewRequest, StepPlan
from engine.dispatch.sampling import Pooling, SamplingRecord, u32
from engine.sampling.masks import pack_mask
from engine.worker.build import build_worker
from tests.integration.plan_driver import GREEDY, PlanDriver, plan_fork
from tests.unit.engine.tiny_model import CONFIG, tensors, write_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The longest takes several steps where the budget is small, and more than one block.
PROMPTS = [[5, 9, 33, 7, 21, 60, 3], [1], list(range(3, 23)), [8, 8]]
OUTPUT_TOKENS = 4


class InterpretedPlatform(CudaPlatform):
    """The GPU's platform where there is none: memory is not measured, and nothing is captured."""

    def bytes_for_kv(self, make_trial: object) -> int:
        return 1 << 24

    def finish(self, runner: object) -> None:
        pass


PLATFORM = CudaPlatform if DEVICE == "cuda" else InterpretedPlatform


def config(directory: Path, device: str, **changes: object) -> WorkerConfig:
    return WorkerConfig(
        model=str(directory),
        socket=Path("unused"),
        device=device,
        dtype="float32",
        num_blocks=40,
        max_num_seqs=6,
        max_num_batched_tokens=64,
        max_model_len=64,
        **changes,
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # With tied embeddings so small a model repeats its input, whatever attention does.
    return write_model(tmp_path_factory.mktemp("model"), head_dim=16, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def reference(directory: Path) -> CpuModelRunner:
    runner = build_worker(config(directory, "cpu"), CpuPlatform).runner
    assert isinstance(runner, CpuModelRunner)
    return runner


@pytest.fixture(scope="module")
def runner(directory: Path) -> CudaModelRunner:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling_extras, "ROWS_AT_ONCE", 2)
        patch.setattr(prompt_states, "POSITIONS_AT_ONCE", 4)
        runner = build_worker(config(directory, DEVICE), PLATFORM).runner
    assert isinstance(runner, CudaModelRunner)
    return runner


@pytest.mark.parametrize(("budget", "steps_ahead"), [pytest.param(7, 1, marks=pytest.mark.slow), (64, 0)])
def test_greedy_tokens_are_those_of_the_cpu_runner(reference, runner, budget, steps_ahead) -> None:
    outputs = []
    for each in (reference, runner):
        each.reset()
        requests = PlanDriver(each, budget=budget, steps_ahead=steps_ahead).generate(PROMPTS, OUTPUT_TOKENS)
        outputs.append([request.output for request in requests])
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("tokens", [[40], [40, 2, 17]], ids=["a decode", "a chunk"])
def test_a_copied_block_is_as_good_as_a_computed_one(reference, runner, tokens) -> None:
    results = []
    for each, copied in ((reference, False), (runner, True), (runner, False)):
        each.reset()
        results.append(
            [each.launch(plan).result() for plan in plan_fork(PROMPTS[0], tokens, copied=copied)][-1]
        )
    expected, *ours = results
    for each in ours:
        assert each.error == ""
        assert each.token_ids.tolist() == expected.token_ids.tolist()
        assert list(each.logprobs[0].top_logprobs) == pytest.approx(
            list(expected.logprobs[0].top_logprobs), abs=1e-4
        )


def test_all_ways_of_sampling_are_those_of_the_cpu_runner(reference, runner) -> None:
    records = [
        SamplingRecord(seed=1, temperature=0.8, top_p=0.9, logprobs=3),
        SamplingRecord(
            seed=2, temperature=1.2, repetition_penalty=1.5, frequency_penalty=0.5, top_k=7, logprobs=1
        ),
        SamplingRecord(
            temperature=0.0, logit_bias=((11, 3.0), (58, -50.0)), presence_penalty=-8.0, logprobs=0
        ),
        GREEDY,
        SamplingRecord(
            seed=3,
            min_p=0.05,
            presence_penalty=-8.0,
            allowed_token_ids=tuple(range(20, 60)),
            min_tokens=2,
            masked_until_min_tokens=tuple(range(20, 40)),
        ),
    ]
    results = []
    for each in (reference, runner):
        each.reset()
        driver = PlanDriver(each, budget=20, steps_ahead=1)
        results.append(driver.generate([*PROMPTS, [40, 2]], OUTPUT_TOKENS, records))
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert ours.output == theirs.output
        assert len(ours.logprobs) == len(theirs.logprobs)
        for mine, expected in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert mine.logprob == pytest.approx(expected.logprob, abs=1e-4)
            assert list(mine.top_ids) == list(expected.top_ids)
            assert list(mine.top_logprobs) == pytest.approx(list(expected.top_logprobs), abs=1e-4)
    [*_, limited] = results[1]
    assert min(limited.output[:2]) >= 40
    assert min(limited.output) >= 20


def allowing(output: list[int]) -> np.ndarray:
    """Tokens that follow from the one before."""
    last = output[-1] if output else 0
    allowed = np.zeros(64, dtype=np.bool_)
    allowed[[(7 * last + 3) % 64, (last + 31) % 64, (11 * last) % 64]] = True
    return pack_mask(allowed)


def test_masks_and_bad_words_are_those_of_the_cpu_runner(reference, runner) -> None:
    reference.reset()
    first = PlanDriver(reference).generate(PROMPTS, OUTPUT_TOKENS)
    words = [request.output for request in first]
    records = [
        GREEDY,
        SamplingRecord(seed=1, temperature=1.4, logprobs=2),
        replace(GREEDY, bad_words=((words[2][0],), tuple(words[2][1:3]))),
        SamplingRecord(seed=5, temperature=2.0, bad_words=tuple((i,) for i in range(1, 64, 2))),
        replace(GREEDY, bad_words=tuple((i,) for i in range(64)), repetition_penalty=2.0),
        replace(GREEDY, allowed_token_ids=(3, 31, 34), min_tokens=2, masked_until_min_tokens=(3,)),
    ]
    masked = (0, 1, 4, 5)
    results = []
    for each in (reference, runner):
        each.reset()
        driver = PlanDriver(each, budget=20, steps_ahead=1)
        prompts = [*PROMPTS, [40, 2], [7, 7, 7]]
        requests = [
            driver.add(prompt, OUTPUT_TOKENS, record) for prompt, record in zip(prompts, records, strict=True)
        ]
        for i in masked:
            requests[i].mask = allowing
        driver.run()
        results.append([request.output for request in requests])
        for i in masked:
            output = requests[i].output
            for n, token_id in enumerate(output):
                assert int(allowing(output[:n])[token_id // 32]) >> token_id % 32 & 1
        assert words[2][0] not in requests[2].output
        assert all(token_id % 2 == 0 for token_id in requests[3].output)
    assert results[0] == results[1]


def test_classifications_are_those_of_the_cpu_runner(tmp_path: Path) -> None:
    labels = {str(number): f"class {number}" for number in range(3)}
    weights = tensors(CONFIG) | {"score.weight": torch.randn(3, CONFIG["hidden_size"])}
    write_model(tmp_path, weights, architectures=["LlamaForSequenceClassification"], id2label=labels)
    results = []
    for device, platform in (("cpu", CpuPlatform), (DEVICE, PLATFORM)):
        runner = build_worker(config(tmp_path, device), platform).runner
        driver = PlanDriver(runner, budget=7, steps_ahead=1)
        records = [SamplingRecord(pooling=Pooling.LAST)] * len(PROMPTS)
        results.append([request.pooled for request in driver.generate(PROMPTS, 1, records)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == (3,)
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(("budget", "steps_ahead"), [pytest.param(7, 1, marks=pytest.mark.slow), (64, 0)])
def test_prompts_are_told_of_as_by_the_cpu_runner(reference, runner, budget, steps_ahead) -> None:
    records = [
        replace(GREEDY, prompt_logprobs=3, logprobs=1),
        replace(GREEDY, prompt_logprobs=2),
        SamplingRecord(pooling=Pooling.MEAN),
        replace(GREEDY, prompt_logprobs=0, presence_penalty=1.0),
        SamplingRecord(pooling=Pooling.LAST),
        SamplingRecord(pooling=Pooling.CLS),
    ]
    prompts = [*PROMPTS, PROMPTS[0], PROMPTS[2]]
    results = []
    for each in (reference, runner):
        each.reset()
        driver = PlanDriver(each, budget=budget, steps_ahead=steps_ahead)
        results.append(driver.generate(prompts, OUTPUT_TOKENS, records))
    told = 0
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert ours.output == theirs.output
        assert (ours.pooled is None) == (theirs.pooled is None) == (not ours.sampling.pooling)
        if theirs.pooled is not None:
            np.testing.assert_allclose(ours.pooled, theirs.pooled, atol=1e-4)
        assert len(ours.prompt_logprobs) == len(theirs.prompt_logprobs)
        for mine, expected in zip(ours.prompt_logprobs, theirs.prompt_logprobs, strict=True):
            told += len(mine.logprobs)
            assert (mine.index, mine.first) == (expected.index, expected.first)
            assert mine.top_ids.tolist() == expected.top_ids.tolist()
            np.testing.assert_allclose(mine.logprobs, expected.logprobs, atol=1e-4)
            np.testing.assert_allclose(mine.top_logprobs, expected.top_logprobs, atol=1e-4)
    assert told == 6 + 0 + 1


def test_prompt_logits_that_are_not_finite_are_an_error(runner, monkeypatch) -> None:
    prompt = PROMPTS[0]
    runner.reset()
    request = NewRequest(0, u32(prompt), len(prompt), u32([1]), replace(GREEDY, prompt_logprobs=1))
    columns = (u32([0]), u32([0]), u32([4]), u32([0]), u32([0]))
    plan = StepPlan(0, u32([0]), [request], *columns, new_block_ids=u32([]))
    assert runner.launch(plan).result().error == ""
    compute = runner._prompts._compute_logits
    monkeypatch.setattr(runner._prompts, "_compute_logits", lambda *given: compute(*given) * torch.nan)
    assert runner.launch(plan).result().error == "the model's logits are not finite"


def test_a_step_without_such_requests_does_nothing_of_it(runner, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("called")

    runner.reset()
    monkeypatch.setattr(runner._prompts, "after_model", fail)
    monkeypatch.setattr(runner._extras, "_resample", fail)
    requests = PlanDriver(runner, budget=20).generate([[5, 9, 33]], 2)
    assert len(requests[0].output) == 2


def test_rehearsing_leaves_no_trace(runner) -> None:
    before = runner.rows.arena.clone()
    runner.rehearse_sizes([GraphSize(2, 0, 0, False)])
    assert torch.equal(runner.rows.arena, before)
