"""The kernels' tests again, with kernels that find reads and writes out of bounds and undefined behaviour."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from engine.cpu.kernels.build import BuildError, build, find_compiler
from pagewire.hub.cache import cache_home
from tests.unit.engine.cpu_kernels.conftest import FLAGS_VARIABLE

FLAGS = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kernels_are_clean_with_sanitizers() -> None:
    try:
        command = find_compiler().command
        build(cache_home() / "native", tuple(shlex.split(FLAGS)))  # without the runtime in the compiler
    except BuildError as error:
        pytest.skip(str(error))
    found = subprocess.run(
        [*command, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    runtime = Path(found.stdout.strip())
    if not runtime.is_absolute():  # clang links its own another way
        pytest.skip("the compiler has no library of the address sanitizer to load first")
    environment = {
        **os.environ,
        FLAGS_VARIABLE: FLAGS,
        "LD_PRELOAD": str(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",  # of Python itself
    }
    here = Path(__file__).parent
    tests = [str(here / name) for name in ("test_products.py", "test_layers.py", "test_threads.py")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", *tests],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
