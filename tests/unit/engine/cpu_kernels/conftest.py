"""The native kernels, compiled once for all tests: with each instruction set, and with one and several
threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.cpu.kernels.build import INSTRUCTION_SETS, BuildError, build
from engine.cpu.kernels.library import NativeLibrary, UnknownInstructionsError
from pagewire.base.cache_home import cache_home


@pytest.fixture(scope="session")
def library_path() -> Path:
    try:
        return build(cache_home() / "native")
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
