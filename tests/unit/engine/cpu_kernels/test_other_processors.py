"""The kernels on a processor of another kind, emulated: plain C++, and what its compiler makes of it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from engine.cpu.kernels.build import FLAGS, INSTRUCTION_SETS, SOURCES

CHECK = Path(__file__).with_name("check.cpp")
# Debian's packages g++-aarch64-linux-gnu and qemu-user.
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_are_their_definitions_on_aarch64(tmp_path: Path) -> None:
    if not shutil.which(COMPILER) or not shutil.which(EMULATOR):
        pytest.skip(f"there is no {COMPILER} or no {EMULATOR}")
    sources = [
        str(path)
        for path in SOURCES.glob("*.cpp")
        if path.stem.rpartition("_")[2] not in INSTRUCTION_SETS  # those are of x86-64
    ]
    program = tmp_path / "check"
    command = [COMPILER, *FLAGS, f"-I{SOURCES}", str(CHECK), *sources, "-static", "-o", str(program)]
    subprocess.run(command, check=True)
    run = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:]
    assert "plain, 3 threads: 0 failures" in run.stdout
