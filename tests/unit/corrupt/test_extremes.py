"""Files made to do harm are refused with a line that names them, in little time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.unit.corrupt.extremes import EXTREMES

SECONDS = 15
MEMORY = 512 * 2**20


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Any]]:
    """How each case ended in a process of its own."""
    limits = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.corrupt.extremes"],
        env={**os.environ, **limits},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", EXTREMES)
def test_a_file_made_to_do_harm_does_none(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    outcome, said = outcomes[name], EXTREMES[name].said
    assert outcome["status"] == ("refused" if said else "loaded"), outcome["report"]
    assert said in outcome["report"]
    assert outcome["seconds"] < SECONDS
    assert outcome["growth"] < MEMORY
