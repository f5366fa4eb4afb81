"""`pagewire bench` from outside: what it prints and what it writes down."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.engine.tiny_model import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("bench") / "tiny")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pagewire", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def record(run: subprocess.CompletedProcess[str], path: Path) -> dict[str, Any]:
    assert run.returncode == 0, run.stderr
    written: dict[str, Any] = json.loads(path.read_text())
    return written


def test_throughput_of_a_workload_of_ones_own(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "throughput.json"
    lengths = ("--num-requests", "6", "--prompt-len", "5:40", "--output-len", "3", "--shared-prefix", "32")
    run = bench("throughput", str(model), "--device", "cpu", *lengths, "--repeat", "2", "--json", str(path))
    written = record(run, path)
    assert "custom 6 x (32 shared + 5:40)/3: " in run.stderr
    heading, row = run.stdout.splitlines()
    assert heading.split()[:4] == ["WORKLOAD", "REQUESTS", "TOKENS/S", "OF"]
    assert row.startswith("custom")
    result = written["results"]["custom"]
    assert (result["output_tokens"], len(result["runs"])) == (18, 2)
    assert all(run["prefix_cache_hits"] == 5 * 32 for run in result["runs"])
    assert written["command"].startswith("pagewire bench throughput ")
    assert written["command"].endswith(f"--repeat 2 --json {path}")
    assert written["versions"]["torch"]
    assert written["machine"]["cores"] >= 1
    assert set(written) >= {"benchmark", "commit", "date", "model", "options", "engine", "targets"}
    assert written["engine"]["device"] == "cpu"
    assert written["engine"]["load_s"] > 0


@pytest.mark.slow  # the same engine as for throughput
def test_latency_of_a_workload_by_name(model: Path, tmp_path: Path) -> None:
    directory = write_model(tmp_path / "longer", max_position_embeddings=512)
    path = tmp_path / "latency.json"
    run = bench("latency", str(directory), "--device", "cpu", "--repeat", "2", "--json", str(path))
    result = record(run, path)["results"]["W3"]
    assert (result["workload"], result["num_requests"], result["batch_size"]) == ("1 x 128/256", 2, 1)
    assert 0 < result["tpot_ms"]["p50"] < result["ttft_ms"]["p99"] < result["e2e_ms"]["max"]
    assert [line.split()[-6] for line in run.stdout.splitlines()[1:]] == ["ttft", "tpot", "itl", "e2e"]


@pytest.mark.slow  # starts the service four times
def test_startup_with_empty_caches_and_with_full_ones(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "startup.json"
    run = bench("startup", str(model), "--device", "cpu", "--repeat", "1", "--json", str(path))
    results = record(run, path)["results"]
    assert list(results) == ["cold", "warm"]
    for result in results.values():
        processes = result["ready_by_process_s"]
        assert set(processes) == {"engine-worker", "scheduler", "frontend"}
        assert 0 < processes["engine-worker"] <= result["ready_s"] + 0.01
        assert 0 < result["first_token_after_ready_s"] < 10
        assert any("loaded" in line for line in result["log"])
    assert run.stdout.split()[:2] == ["CACHES", "READY"]


@pytest.mark.slow  # a service for each of two strategies
def test_strategies_side_by_side(tmp_path: Path, smollm2_dir: Path) -> None:
    path, picture = tmp_path / "strategies.json", tmp_path / "strategies.svg"
    engine = (
        "--engine",
        "null",
        "--null-step-ms",
        "2",
        "--max-num-seqs",
        "3",
        "--strategies",
        "none,dynamic",
    )
    load = ("--num-requests", "6", "--concurrency", "3", "--input-len", "5", "--output-len", "20")
    output = ("--json", str(path), "--picture", str(picture))
    run = bench("strategies", str(smollm2_dir), *engine, *load, *output)
    written = record(run, path)
    assert [line.split()[0] for line in run.stdout.splitlines()] == ["STRATEGY", "none", "dynamic"]
    assert list(written["results"]) == ["none", "dynamic"]
    assert (written["benchmark"], written["load"], written["max_num_seqs"]) == (
        "strategies",
        "3 at a time",
        3,
    )
    for result in written["results"].values():
        assert result["requests"]["complete"] == 6
        assert result["output_tokens"] == 6 * 20
        assert 0 < result["ttft_ms"]["p50"] <= result["e2e_ms"]["p99"]
    assert written["results"]["none"]["ttft_ms"]["p99"] > written["results"]["dynamic"]["ttft_ms"]["p50"]
    assert picture.read_text().startswith("<svg ")
    assert all(name in picture.read_text() for name in ("none", "dynamic", "output tokens/s"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("strategies", "--strategies", "none,all"), "one or more of none, static, dynamic, inflight"),
        (("throughput", "--workload", "W9"), "workload is 'W9'; it must be one or more of W1, W2"),
        (("throughput", "--prompt-len", "5:4"), "prompt-len is '5:4'"),
        (("latency", "--workload", "W1", "--prompt-len", "5"), "give it, or lengths, not both"),
        (("throughput", "qwen06b", "--load-format", "safetensors"), "load_format can only be dummy"),
        (("throughput", "no-such-model"), "unknown model 'no-such-model'"),
        (("startup", "no-such-model"), "unknown model 'no-such-model'"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_said_with_status_2(
    arguments: tuple[str, ...], message: str
) -> None:
    run = bench(*arguments)
    assert run.returncode == 2
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_a_service_that_does_not_get_ready_is_an_error_with_its_last_lines(model: Path) -> None:
    run = bench("startup", str(model), "--device", "cpu", "--timeout", "1")
    assert run.returncode == 1
    assert "pagewire serve was not ready after 1 s; its last lines:" in run.stderr
