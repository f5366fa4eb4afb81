"""The runner for GPUs proposes and accepts drafts as that for CPUs does without: the same tokens come out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.test_speculation import (
    LENGTHS,
    NGRAM,
    PROMPTS,
    RECORDS,
    check_counters,
    compare,
    driver,
)
from tests.kernels.test_cuda_runner import DEVICE, PLATFORM
from tests.unit.engine.tiny_model import write_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), head_dim=16, tie_word_embeddings=False)


def test_drafts_change_no_token_on_a_gpu(directory: Path) -> None:
    drafted = driver(directory, PLATFORM, device=DEVICE, speculative_config=NGRAM)
    # A greedy request, and one with a penalty, a bias and log probabilities.
    compare(drafted, driver(directory, None), [PROMPTS[0], PROMPTS[3]], 9, [RECORDS[0], RECORDS[3]])
    assert drafted.scheduler.counters.num_accepted_tokens > 0


@pytest.mark.slow
def test_every_way_of_sampling_gives_the_same_with_drafts_on_a_gpu(directory: Path) -> None:
    drafted = driver(directory, PLATFORM, device=DEVICE, speculative_config=NGRAM)
    compare(drafted, driver(directory, None), lengths=[min(each, 12) for each in LENGTHS])
    check_counters(drafted)
