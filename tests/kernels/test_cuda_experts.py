"""Mixtures of experts by the kernels: the results are those of the runner for CPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.cpu.platform import CpuPlatform
from engine.cuda.expert_method import CudaExperts
from engine.dispatch.sampling import SamplingRecord
from engine.kernels.experts import choice
from engine.layers.expert_config import ExpertTensors
from engine.layers.experts import ExpertShape, ExpertWeights
from engine.layers.linear_method import LinearShape
from engine.layers.linear_weight import OutputShard
from engine.layers.parallel import FeatureRange, SplitError
from engine.worker.build import build_worker
from tests.kernels.test_cuda_runner import DEVICE, InterpretedPlatform, config
from tests.kernels.test_cuda_shared_prefix import launch_all
from tests.unit.engine.tiny_experts import write_gpt_oss


@pytest.mark.parametrize(
    ("kind", "deterministic"),
    [
        pytest.param("mxfp4", False, marks=pytest.mark.slow),
        pytest.param("plain", True, marks=pytest.mark.slow),
    ],
)
def test_log_probabilities_are_those_of_the_cpu_runner(
    tmp_path: Path, kind: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In prompts, and in decodes. These take tiles too: interpreting rows takes four times as long, and
    test_experts.py does it."""
    monkeypatch.setattr(choice, "takes_rows", lambda *_, **__: False)
    write_gpt_oss(tmp_path / "mxfp4", tmp_path / "plain")
    directory = tmp_path / kind
    sampling = SamplingRecord(temperature=0.0, logprobs=3)
    reference = build_worker(config(directory, "cpu"), CpuPlatform).runner
    settings = config(directory, DEVICE, deterministic=deterministic)
    runner = build_worker(settings, InterpretedPlatform).runner
    for ours, expected in zip(launch_all(runner, sampling), launch_all(reference, sampling), strict=True):
        assert ours.token_ids.tolist() == expected.token_ids.tolist()
        for told, wanted in zip(ours.logprobs.values(), expected.logprobs.values(), strict=True):
            assert list(told.top_logprobs) == pytest.approx(list(wanted.top_logprobs), abs=1e-4)


def test_ranks_cannot_cut_experts_into_rows_that_a_gpu_does_not_copy() -> None:
    channels = FeatureRange(10, 10, 20)
    matrix = LinearShape((OutputShard("down", FeatureRange.whole(16)),), channels)
    with pytest.raises(SplitError, match=r"would hold 10 of each expert's channels; .* a multiple of 4"):
        ExpertWeights(
            "experts.down_proj",
            ExpertShape(2, matrix),
            CudaExperts(deterministic=False),
            bias=False,
            tensors=ExpertTensors(),
        )
