"""Models whose layers differ, by the kernels: the results are those of the runner for CPUs, which a plain
computation confirms (tests/unit/engine/test_layer_kinds.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.cpu.platform import CpuPlatform
from engine.cuda import shared_prefix
from engine.dispatch.sampling import SamplingRecord
from engine.worker.build import build_worker
from tests.integration.tiny_families import write_tiny
from tests.kernels.test_cuda_runner import DEVICE, InterpretedPlatform, config
from tests.kernels.test_cuda_shared_prefix import launch_all
from tests.unit.engine.patchwork_model import FAMILIES, write_patchwork

# Two KV groups, with a window; the interpreter takes long for what other kinds of layers add.
ARCHITECTURES = [
    pytest.param(name, marks=[] if name == "PatchworkForCausalLM" else pytest.mark.slow)
    for name in FAMILIES
    if name != "LocalForCausalLM"
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probabilities_are_those_of_the_cpu_runner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    """In prompts, behind a prefix, and in decodes that share it where their layers allow that."""
    directory = write_patchwork(tmp_path, architecture, monkeypatch)
    monkeypatch.setattr(shared_prefix, "MIN_SAVED_TOKENS", 1)
    sampling = SamplingRecord(temperature=0.0, logprobs=3)
    reference = build_worker(config(directory, "cpu"), CpuPlatform).runner
    runner = build_worker(config(directory, DEVICE), InterpretedPlatform).runner
    steps = zip(launch_all(runner, sampling), launch_all(reference, sampling), strict=True)
    for ours, expected in steps:
        assert ours.token_ids.tolist() == expected.token_ids.tolist()
        for told, wanted in zip(ours.logprobs.values(), expected.logprobs.values(), strict=True):
            assert list(told.top_logprobs) == pytest.approx(list(wanted.top_logprobs), abs=1e-4)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) for case in ("gemma3", "cohere2", "stablelm-12b")]
)
def test_a_family_is_by_the_kernels_what_it_is_by_torch(tmp_path: Path, case: str) -> None:
    """Norms of other kinds and places, gelu, layers that differ in window and rotation, scales."""
    directory, sampling = write_tiny(case, tmp_path), SamplingRecord(temperature=0.0, logprobs=3)
    reference = build_worker(config(directory, "cpu"), CpuPlatform).runner
    runner = build_worker(config(directory, DEVICE), InterpretedPlatform).runner
    for ours, expected in zip(launch_all(runner, sampling), launch_all(reference, sampling), strict=True):
        assert ours.token_ids.tolist() == expected.token_ids.tolist()
        for told, wanted in zip(ours.logprobs.values(), expected.logprobs.values(), strict=True):
            assert list(told.top_logprobs) == pytest.approx(list(wanted.top_logprobs), abs=1e-4)
