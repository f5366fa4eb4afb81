"""Models come from a Hugging Face Hub without code or pickles, and stay usable without a network.

The Hub is a small server of ours that speaks the few requests which huggingface_hub makes.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pagewire.base.errors import ConfigError
from pagewire.hub.huggingface import is_huggingface_id, require_complete

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"x",
    "pytorch_model.bin": b"a pickle",
    "modeling_custom.py": b"code",
    "original/consolidated.safetensors": b"the same weights again",
    "README.md": b"words",
}


def file_entry(name: str) -> dict[str, object]:
    """A file as the Hub's tree listing gives it."""
    content = FILES[name]
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


class Hub(BaseHTTPRequestHandler):
    fetched: list[str] = []  # noqa: RUF012 (one server a test run)

    def do_HEAD(self) -> None:
        self.answer(send_body=False)

    def do_GET(self) -> None:
        self.answer(send_body=True)

    def answer(self, *, send_body: bool) -> None:
        prefix, _, name = self.path.partition(f"/owner/model/resolve/{COMMIT}/")
        if self.path.startswith("/api/models/owner/model/tree/"):
            body = json.dumps([file_entry(name) for name in FILES]).encode()
            headers = {"Content-Type": "application/json"}
        elif self.path.startswith("/api/models/owner/model"):
            siblings = [{"rfilename": name} for name in FILES]
            body = json.dumps({"id": "owner/model", "sha": COMMIT, "siblings": siblings}).encode()
            headers = {"Content-Type": "application/json"}
        elif not prefix and name in FILES:
            body = FILES[name]
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.fetched.append(name)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        for header, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(header, value)
        self.end_headers()
        if send_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def resolve(model: str, endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, because huggingface_hub reads its environment when it is imported."""
    script = (
        "import sys; from pagewire.hub import resolve_model; from pagewire.base.errors import ConfigError\n"
        "try: print(resolve_model(sys.argv[1]))\n"
        "except ConfigError as error: sys.exit(f'ConfigError: {error}')"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "PAGEWIRE_HOME": str(home),
        "PYTHONPATH": os.getcwd(),
    }
    command = [sys.executable, "-c", script, model]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_only_data_is_fetched_and_it_is_there_without_a_network(hub: str, tmp_path: Path) -> None:
    done = resolve("owner/model", hub, tmp_path)
    assert done.returncode == 0, done.stderr
    directory = Path(done.stdout.strip())
    assert directory.is_relative_to(tmp_path)
    expected = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert {file.name for file in directory.iterdir()} == expected
    assert set(Hub.fetched) == expected
    again = resolve("owner/model", "http://127.0.0.1:9", tmp_path)
    assert again.stdout == done.stdout, again.stderr


def test_an_unknown_model_is_named(hub: str, tmp_path: Path) -> None:
    done = resolve("owner/other", hub, tmp_path)
    assert done.returncode != 0
    assert "ConfigError: owner/other: no such model on the Hugging Face Hub" in done.stderr


def test_without_a_network_the_error_says_what_else_to_name(tmp_path: Path) -> None:
    done = resolve("owner/model", "http://127.0.0.1:9", tmp_path)
    assert done.returncode != 0
    assert (
        "ConfigError: owner/model: not in the cache, and fetching it from the Hugging Face Hub failed"
        in done.stderr
    )
    assert ".gguf file" in done.stderr


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("Qwen/Qwen2.5-0.5B", True),
        ("a/b", True),
        ("a/b/c", False),
        ("../b", False),
        ("a/..", False),
        ("/a", False),
        ("a", False),
        ("", False),
    ],
)
def test_ids_have_an_owner_and_a_name(model: str, expected: bool) -> None:
    assert is_huggingface_id(model) is expected


def test_a_snapshot_without_all_its_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        require_complete(tmp_path, "m")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no safetensors"):
        require_complete(tmp_path, "m")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "1.safetensors").touch()
    with pytest.raises(ConfigError, match=r"missing: 2\.safetensors"):
        require_complete(tmp_path, "m")
    (tmp_path / "2.safetensors").touch()
    assert require_complete(tmp_path, "m") == tmp_path
