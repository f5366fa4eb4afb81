"""A model whose files are damaged or made to do harm ends the real commands with status 2 and one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

from pagewire.base.cache_home import cache_home
from tests.unit.corrupt.samples import write_directory, write_gguf
from tools.service import Service

# Loading included. A request waits 30 s for an engine that may yet come.
SECONDS_TO_END = 15.0


def absurd_size(directory: Path) -> Path:
    path = write_directory(directory) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "hidden_size": 10**12}))
    return directory


def cut_weights(directory: Path) -> Path:
    path = write_directory(directory) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return directory


def no_norm(directory: Path) -> Path:
    path = write_directory(directory) / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)
    return directory


def highest_token_id(directory: Path) -> Path:
    path = write_directory(directory) / "tokenizer.json"
    content = json.loads(path.read_bytes())
    content["model"]["vocab"]["evil"] = 2**32 - 1
    path.write_text(json.dumps(content))
    return directory


def brackets(directory: Path) -> Path:
    (write_directory(directory) / "tokenizer_config.json").write_bytes(b'{"a":' + b"[" * 10**6)
    return directory


def endless_template(directory: Path) -> Path:
    template = "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}"
    (write_directory(directory) / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return directory


def cut_gguf(directory: Path) -> Path:
    directory.mkdir()
    path = write_gguf(directory / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:50_000])
    return path


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    (home / "native").symlink_to(cache_home() / "native")  # compiled once for all
    environment = {**os.environ, "PAGEWIRE_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *arguments, "--device", "cpu"]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=90, check=False, cwd=Path.cwd()
    )


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (
            absurd_size,
            "engine-worker: {}/config.json: hidden_size is 1000000000000; it must be at most 1048576",
        ),
        pytest.param(
            highest_token_id,
            "frontend: {}/tokenizer.json: a token has the id 4294967295; the highest",
            marks=pytest.mark.slow,
        ),
        (brackets, "{}/tokenizer_config.json is nested too deeply; at most 64 levels are read"),
        (endless_template, "frontend: {}/tokenizer_config.json: the chat template takes more calls within"),
        (cut_gguf, "{}: truncated: tensor 'blk."),
    ],
    ids=["config", "tokenizer", "settings", "template", "gguf"],
)
def test_serve_ends(tmp_path: Path, write: Callable[[Path], Path], said: str) -> None:
    model = write(tmp_path / "model")
    ended = run(tmp_path, "pagewire", "serve", str(model), "--port", "0", "--grpc-port", "0")
    assert ended.returncode == 2, ended
    *_, line = ended.stderr.splitlines()
    assert line.startswith("pagewire: " + said.format(model))
    assert "Traceback" not in ended.stdout + ended.stderr


def test_a_request_that_waits_for_a_model_that_cannot_be_loaded_holds_nothing_up(tmp_path: Path) -> None:
    model = no_norm(tmp_path / "model")
    service = Service(tmp_path, model=str(model), options=("--device", "cpu"))
    answer, asked_at = ask_while_it_starts(service)
    status = service.process.wait(60)
    assert time.monotonic() - asked_at < SECONDS_TO_END, service.log
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "this server is shutting down, and has no engine"
    assert status == 2, service.log
    *_, line = service.log.splitlines()
    assert line.startswith("pagewire: engine-worker: ")
    assert "model.norm.weight" in line


def ask_while_it_starts(service: Service) -> tuple[httpx.Response, float]:
    """The answer to a request that is sent as soon as the service listens, and when that was."""
    while service.process.poll() is None:
        try:
            asked_at = time.monotonic()
            body = {"prompt": "a", "max_tokens": 1}
            return httpx.post(f"{service.http_url}/v1/completions", json=body, timeout=60), asked_at
        except httpx.ConnectError:
            time.sleep(0.05)
    raise AssertionError(f"it ended before it listened:\n{service.log}")


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (cut_weights, "{}/model.safetensors cannot be read as safetensors: "),
        (cut_gguf, "{}: truncated: tensor 'blk."),
    ],
    ids=["weights", "gguf"],
)
def test_a_worker_ends(tmp_path: Path, write: Callable[[Path], Path], said: str) -> None:
    model = write(tmp_path / "model")
    ended = run(tmp_path, "pagewire", "engine-worker", str(model), "--socket", str(tmp_path / "w.sock"))
    assert ended.returncode == 2, ended
    [line] = ended.stderr.splitlines()
    assert line.startswith("engine-worker: " + said.format(model))
