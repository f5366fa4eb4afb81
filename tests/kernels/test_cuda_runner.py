"""The runner for GPUs gives the tokens of the runner for CPUs. Without a GPU its kernels are interpreted, and
CUDA graphs are left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.build import build_worker
from engine.config import WorkerConfig
from engine.cuda import unusual_rows
from engine.cuda.platform import CudaPlatform
from engine.cuda.runner import CudaModelRunner
from engine.dispatch.records import SamplingRecord
from engine.model_runner import ModelRunner
from engine.platform import CpuPlatform
from tests.integration.plan_driver import GREEDY, PlanDriver
from tests.unit.engine.tiny_model import write_model

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
def reference(directory: Path) -> ModelRunner:
    runner = build_worker(config(directory, "cpu"), CpuPlatform).runner
    assert isinstance(runner, ModelRunner)
    return runner


@pytest.fixture(scope="module")
def runner(directory: Path) -> CudaModelRunner:
    platform = CudaPlatform if DEVICE == "cuda" else InterpretedPlatform
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unusual_rows, "ROWS_AT_ONCE", 2)
        runner = build_worker(config(directory, DEVICE), platform).runner
    assert isinstance(runner, CudaModelRunner)
    return runner


@pytest.mark.parametrize(("budget", "steps_ahead"), [(7, 1), (64, 0)])
def test_greedy_tokens_are_those_of_the_cpu_runner(reference, runner, budget, steps_ahead) -> None:
    outputs = []
    for each in (reference, runner):
        each.reset()
        requests = PlanDriver(each, budget=budget, steps_ahead=steps_ahead).generate(PROMPTS, OUTPUT_TOKENS)
        outputs.append([request.output for request in requests])
    assert outputs[0] == outputs[1]


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


def test_rehearsing_leaves_no_trace(runner) -> None:
    before = runner.rows.arena.clone()
    runner.rehearse_sizes([(2, 0, 0, False)])
    assert torch.equal(runner.rows.arena, before)
