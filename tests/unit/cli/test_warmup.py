"""pagewire warmup: what it compiles, where it keeps that, and what it says where it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.engine.tiny_model import CONFIG

FEWEST_KERNELS = ("--max-num-seqs", "1", "--max-num-batched-tokens", "16")


def warmup(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs it as on a machine without a GPU, keeping what it compiles under `directory`."""
    (directory / "config.json").write_text(json.dumps({**CONFIG, "head_dim": 16}))
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "pagewire", "warmup", str(directory), *options],
        capture_output=True,
        text=True,
        env={**kept, "CUDA_VISIBLE_DEVICES": "", "PAGEWIRE_HOME": str(directory / "home")},
        check=False,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "there is no GPU here to compile kernels for; name an architecture instead: --target sm_90"),
        (("--target", "hopper"), "target is 'hopper'; it must be like sm_90"),
        (("--target", "sm_12"), "target is 'sm_12'; without such a GPU it must be one of sm_80"),
        (("--target", "sm_90", "--device", "cpu"), "device is 'cpu'; kernels are compiled for GPUs only"),
    ],
)
def test_what_cannot_be_compiled_for_is_said_with_status_2(
    tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    run = warmup(tmp_path, *options)
    assert (run.returncode, run.stdout) == (2, "")
    assert message in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.slow  # of tests/unit/engine/test_compile_ahead.py
def test_kernels_for_another_machine_s_gpu_are_kept_by_architecture_and_versions(tmp_path: Path) -> None:
    run = warmup(tmp_path, "--target", "sm_90", *FEWEST_KERNELS)
    assert (run.returncode, run.stderr) == (0, "")
    *_, counted, kept = run.stdout.splitlines()
    directory = Path(kept.removeprefix("kept in "))
    assert directory.parent == tmp_path / "home" / "triton"
    assert directory.name.startswith("sm_90-triton-")
    assert counted.startswith(f"{len(list(directory.glob('*/*.cubin')))} kernels for sm_90 in ")

    again = warmup(tmp_path, "--target", "sm_90", *FEWEST_KERNELS)
    assert (again.returncode, again.stdout) == (0, f"all kernels for sm_90 are in {directory} already\n")
