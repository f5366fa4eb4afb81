"""A Node client built from the .proto files alone, against a real server."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pagewire.base.cache_home import cache_home

SOURCE = Path(__file__).parent / "node"
PROTOS = Path(__file__).parents[2] / "protos"

pytestmark = pytest.mark.skipif(
    shutil.which("node") is None or shutil.which("npm") is None, reason="node and npm are not installed"
)


@pytest.fixture(scope="module")
def node_modules() -> Path:
    """The client's packages, installed once for each lock file, outside the tree."""
    lock = (SOURCE / "package-lock.json").read_bytes()
    directory = cache_home() / "tests" / f"node-{hashlib.sha256(lock).hexdigest()[:16]}"
    done = directory / "installed"
    if not done.exists():
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(SOURCE / name, directory)
        command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline"]
        subprocess.run(command, cwd=directory, check=True, timeout=280)
        done.touch()
    return directory / "node_modules"


@pytest.fixture(scope="module")
def seen(server: Any, node_modules: Path) -> dict[str, Any]:
    """What the client saw of the server."""
    completed = subprocess.run(
        ["node", str(SOURCE / "client.js"), server.grpc_target, str(PROTOS)],
        env={**os.environ, "NODE_PATH": str(node_modules)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout)


def test_models_and_tokens(server: Any, seen: dict[str, Any]) -> None:
    assert [model["id"] for model in seen["models"]["models"]] == [server.model]
    assert seen["text"]["text"] == "Hello, wörld"


def test_stream_equals_the_whole_completion(seen: dict[str, Any]) -> None:
    *deltas, last = seen["streamed"]["events"]
    assert seen["streamed"]["code"] == "OK"
    assert last["event"] == "finished"
    assert last["finished"]["finish_reason"] in ("FINISH_REASON_STOP", "FINISH_REASON_LENGTH")
    text = "".join(event["delta"]["text"] for event in deltas)
    assert text == seen["whole"]["text"] != ""
    token_ids = [token_id for event in deltas for token_id in event["delta"]["token_ids"]]
    assert token_ids == seen["whole"]["token_ids"]
    assert last["finished"]["usage"]["completion_tokens"] == len(token_ids)


def test_cancel_and_errors_have_their_statuses(seen: dict[str, Any]) -> None:
    assert seen["cancelled"]["code"] == "CANCELLED"
    assert len(seen["cancelled"]["events"]) == 3
    assert seen["refused"]["code"] == "INVALID_ARGUMENT"
    assert "temperature is -1" in seen["refused"]["message"]
