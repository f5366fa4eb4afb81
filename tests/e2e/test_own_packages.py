"""A folder of the user's that has the name of one of our packages is not imported in its place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from pagewire.base.own_packages import ROOT
from tools.service import Service

SCRIPT = """
from pagewire import LLM, SamplingParams

if __name__ == "__main__":
    with LLM("smollm2-135m", engine="null", max_model_len=256) as llm:
        print(len(llm.generate("Once", SamplingParams(max_tokens=5))[0].outputs[0].token_ids))
"""


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """A working directory whose `engine`, `scheduler` and `frontend` end whoever imports them."""
    theirs = "raise SystemExit('the wrong module was imported: ' + __name__)\n"
    for name in ("engine", "frontend"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(theirs)
    (tmp_path / "scheduler.py").write_text(theirs)
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


@pytest.fixture
def environment() -> dict[str, str]:
    """As of a user who has installed pagewire: nothing of it is in the current directory."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_serve_starts_its_own_processes(crowded: Path, smollm2_dir: Path) -> None:
    with Service(crowded, options=("--engine", "null"), directory_to_run_in=crowded) as service:
        service.wait_ready()
        body = {"prompt": "Once", "max_tokens": 5, "structured_outputs": {"choice": ["left", "right"]}}
        answer = httpx.post(f"{service.http_url}/v1/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["text"] in ("left", "right")


def test_llm_imports_and_starts_its_own(
    crowded: Path, environment: dict[str, str], smollm2_dir: Path
) -> None:
    command = [sys.executable, "script.py"]
    run = subprocess.run(
        command, cwd=crowded, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (run.returncode, run.stdout.strip()) == (0, "5"), run.stderr


def test_llm_says_so_where_another_module_of_that_name_is_imported_already(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "engine.py").write_text("")
    program = "import engine; from pagewire import LLM"
    command = [sys.executable, "-c", program]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert "pagewire has a package named 'engine'" in run.stderr
