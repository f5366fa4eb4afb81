"""The README does what it says: its examples are run as they stand, against a real service."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.service import Service

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str, containing: str) -> list[str]:
    """The README's code blocks in a language that contain a text."""
    found = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [block for block in found if containing in block]


def run(command: list[str], block: str, service: Service) -> str:
    """Runs a block with the README's addresses replaced by the service's; returns what it printed."""
    block = block.replace("http://localhost:8000", service.http_url)
    block = block.replace("localhost:50051", service.grpc_target)
    done = subprocess.run(
        [*command, block], capture_output=True, text=True, cwd=ROOT, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_curl(server: Service) -> None:
    [block] = blocks("sh", "curl ")
    assert "Paris" in run(["bash", "-c"], block, server)


@pytest.mark.parametrize(
    ("containing", "expected"),
    [
        ("haiku", ""),
        ("structured_outputs", ""),
        ("import Client", ""),
        ("import grpc", " Paris"),
        ("import LLM", " Paris"),
    ],
    ids=["openai", "constrained", "client", "grpc", "offline"],
)
def test_python(server: Service, containing: str, expected: str) -> None:
    [block] = blocks("python", containing)
    output = run([sys.executable, "-c"], block, server)
    assert output.strip()
    assert expected in output


def test_every_python_example_is_covered() -> None:
    assert len(blocks("python", "")) == 5
