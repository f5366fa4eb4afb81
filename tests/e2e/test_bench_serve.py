"""`pagewire bench serve` against a real service, over both of its protocols."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pagewire.base.errors import PagewireError
from pagewire.cli.main import app
from tools.service import Service

OPTIONS = ("--input-len", "20:40", "--output-len", "30", "--num-requests", "24", "--concurrency", "6")


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_both_protocols_see_every_token(null_service: Service, scheme: str, tmp_path: Path) -> None:
    path = tmp_path / "serve.json"
    url = null_service.http_url if scheme == "http" else f"grpc://{null_service.grpc_target}"
    command = ["bench", "serve", "--url", url, *OPTIONS, "--json", str(path), "--save-requests"]
    before = null_service.metrics()
    run = subprocess.run(
        [sys.executable, "-m", "pagewire", *command], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    record = json.loads(path.read_text())
    assert record["target"]["model"] == null_service.model
    [result] = record["results"]
    assert result["requests"] == {"sent": 24, "complete": 24, "failed": 0, "unfinished": 0, "resent": 0}
    assert (result["output_tokens"], result["wrong_output_length"]) == (24 * 30, 0)
    assert (result["cached_input_tokens"], result["most_open"]) == (0, 6)
    assert result["finish_reasons"] == {"length": 24}
    assert 20 * 24 <= result["input_tokens"] <= 40 * 24
    rows = result["per_request"]
    assert all(0 < row["ttft_ms"] <= row["e2e_ms"] for row in rows)
    # the service counts the same, and the request that warmed it up
    after = null_service.metrics()
    generated = "pagewire:generation_tokens_total"
    told = {name for name in after if name.startswith(generated)}
    assert sum(after[name] - before.get(name, 0) for name in told) == 25 * 30


def test_a_service_that_refuses_is_told_of(null_service: Service) -> None:
    command = ["bench", "serve", "--url", f"grpc://{null_service.grpc_target}", "--model", "another"]
    with pytest.raises(PagewireError, match="no request of the warm-up: gRPC NOT_FOUND: "):
        CliRunner().invoke(app, command, catch_exceptions=False)
