"""The native kernels, compiled once for all tests; with each instruction set, one and several threads."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.cpu.kernels.build import INSTRUCTION_SETS, BuildError, build
from engine.cpu.kernels.library import NativeLibrary, UnknownInstructionsError
from pagewire.hub.cache import cache_home

# Flags for the compiler beyond the usual ones: test_sanitizers.py runs these tests with a sanitizer's.
FLAGS_VARIABLE = "PAGEWIRE_TEST_NATIVE_FLAGS"


@pytest.fixture(scope="session")
def library_path() -> Path:
    try:
        return build(cache_home() / "native", tuple(shlex.split(os.environ.get(FLAGS_VARIABLE, ""))))
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=[*INSTRUCTION_SETS, "plain", "plain, 3 threads"])
def native(library_path: Path, request: pytest.FixtureRequest) -> Iterator[NativeLibrary]:
    instructions, _, threads = request.param.partition(", ")
    try:
        library = NativeLibrary(library_path, 3 if threads else 2, instructions)
    except UnknownInstructionsError as error:
        pytest.skip(str(error))
    yield library
    library.close()
