"""Decodes that share a prefix's blocks give the same tokens whether attention reads it once or for each."""

from __future__ import annotations

import pytest

from engine.cpu.runner import CpuModelRunner
from engine.cuda import shared_prefix
from engine.cuda.runner import CudaModelRunner
from engine.dispatch.records import NewRequest, StepPlan, StepResult
from engine.dispatch.sampling import SamplingRecord, u32
from engine.worker.build import build_worker
from tests.integration.plan_driver import GREEDY
from tests.kernels.test_cuda_runner import DEVICE, InterpretedPlatform, config
from tests.unit.engine.tiny_model import write_model

PREFIX = [(7 * i) % 60 for i in range(32)]
# The prefix's blocks, then each request's own; the third request has nothing in common with the others. Where
# there are several KV groups, those of each are GROUP_STRIDE behind those of the group before.
GROUP_STRIDE = 10
BLOCKS = [[3, 4, 5], [3, 4, 9], [7, 8]]
PROMPTS = [[*PREFIX, 1, 2, 3], [*PREFIX, 40], [9] * 20]
NUM_DECODES = 2


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> CudaModelRunner:
    directory = write_model(tmp_path_factory.mktemp("model"), head_dim=16, tie_word_embeddings=False)
    runner = build_worker(config(directory, DEVICE), InterpretedPlatform).runner
    assert isinstance(runner, CudaModelRunner)
    return runner


def plan(
    step_id: int, starts: list[int], counts: list[int], *new: NewRequest, num_kv_groups: int = 1
) -> StepPlan:
    rows, nothing = u32(range(len(starts))), u32([])
    return StepPlan(
        step_id,
        nothing,
        list(new),
        rows,
        u32(starts),
        u32(counts),
        u32([1] * len(rows)),
        u32([0] * len(rows)),
        nothing,
        num_kv_groups=num_kv_groups,
    )


def launch_all(
    runner: CudaModelRunner | CpuModelRunner, sampling: SamplingRecord = GREEDY
) -> list[StepResult]:
    """The prompts, then decodes of all three."""
    runner.reset()
    num_groups = runner.rows.limits.num_kv_groups
    tables = [[each + GROUP_STRIDE * g for g in range(num_groups) for each in blocks] for blocks in BLOCKS]
    requests = [
        NewRequest(row, u32(prompt), len(prompt), u32(blocks), sampling)
        for row, (prompt, blocks) in enumerate(zip(PROMPTS, tables, strict=True))
    ]
    computed = [0, len(PREFIX), 0]
    counts = [len(prompt) - start for prompt, start in zip(PROMPTS, computed, strict=True)]
    steps = [plan(0, computed, counts, *requests, num_kv_groups=num_groups)]
    lengths = [len(prompt) for prompt in PROMPTS]
    steps += [
        plan(1 + i, [length + i for length in lengths], [1, 1, 1], num_kv_groups=num_groups)
        for i in range(NUM_DECODES)
    ]
    results = [runner.launch(step).result() for step in steps]
    assert not any(result.error for result in results)
    return results


def generate(runner: CudaModelRunner) -> list[list[int]]:
    return [result.token_ids.tolist() for result in launch_all(runner)]


def test_tokens_do_not_depend_on_sharing(runner: CudaModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    apart = generate(runner)
    shapes = []
    compute = runner._compute
    monkeypatch.setattr(runner, "_compute", lambda shape: shapes.append(shape) or compute(shape))
    monkeypatch.setattr(shared_prefix, "MIN_SAVED_TOKENS", 1)
    assert generate(runner) == apart
    assert [shape.shares_prefix for shape in shapes] == [False, *[True] * NUM_DECODES]
