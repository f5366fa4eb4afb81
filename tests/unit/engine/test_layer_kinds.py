"""A family whose layers differ is a reader and nothing else: what it computes is what a plain one does."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import WorkerConfig
from engine.dispatch.sampling import SamplingRecord
from engine.layers.alibi import alibi_slopes
from engine.worker.build import build_worker
from tests.integration.plan_driver import PlanDriver
from tests.unit.engine.patchwork_model import FAMILIES, naive_logits, write_patchwork

PROMPTS = [[5, 9, 33, 7, 21, 60, 3], [1], list(range(3, 43)), [8, 8]]
OUTPUT_TOKENS = 12


@pytest.mark.parametrize("budget", [7, 64])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_log_probabilities_are_those_of_a_plain_computation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, budget: int
) -> None:
    directory = write_patchwork(tmp_path, architecture, monkeypatch)
    config = WorkerConfig(
        model=str(directory), socket=Path("unused"), device="cpu", dtype="float32", num_blocks=32
    )
    driver = PlanDriver(build_worker(config).runner, budget=budget, steps_ahead=1)
    requests = driver.generate(PROMPTS, OUTPUT_TOKENS, SamplingRecord(temperature=0.0, logprobs=3))
    for request, prompt in zip(requests, PROMPTS, strict=True):
        logits = naive_logits(architecture, prompt + request.output)[len(prompt) - 1 : -1]
        expected = logits.log_softmax(dim=-1).topk(3)
        for index, told in enumerate(request.logprobs):
            assert list(told.top_ids) == expected.indices[index].tolist()
            assert list(told.top_logprobs) == pytest.approx(expected.values[index].tolist(), abs=1e-4)


def test_slopes_are_those_of_the_paper() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(6).tolist() == [2.0**-i for i in (2, 4, 6, 8, 1, 3)]
