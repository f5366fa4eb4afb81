"""Fixtures that every kind of test may use."""

from __future__ import annotations

import functools
import gc
import os
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import certifi
import pytest
from hypothesis import HealthCheck, settings

from pagewire.hub import ALIASES, DEFAULT_MODEL, resolve_model
from pagewire.hub.resolve import gguf_file
from tools.service import Service

# As in the worker (engine/worker/process.py): threads that spin while they wait steal time from whatever else
# runs on the machine. It is read when torch is first imported, so it must be set before.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Workers of pytest-xdist share the cores: more threads than those only take turns.
num_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if num_workers > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_workers)))

# Hundreds of processes import the same modules: each would take a second to compile them again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# httpx, and so the clients of openai and anthropic, reads all certificates that the system trusts for every
# client it makes: 50 ms, though most speak plain HTTP here. They share one context.
_create_context = ssl.create_default_context
_system_context = functools.cache(_create_context)


def _shared_context(*purpose: ssl.Purpose, cafile: str | None = None, **others: Any) -> ssl.SSLContext:
    if cafile == certifi.where() and not (purpose or others):
        return _system_context(cafile=cafile)
    return _create_context(*purpose, cafile=cafile, **others)


ssl.create_default_context = _shared_context  # type: ignore[assignment]

# Without a GPU Triton's kernels run in its interpreter, which is chosen when they are first imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Examples are not timed: on a busy machine any of them may take long once.
settings.register_profile("pagewire", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pagewire")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of tests/conformance; they are here because pytest looks for options only at the top."""
    group = parser.getgroup("conformance", "the server that tests/conformance tests; by default its own")
    group.addoption("--base-url", help="the server's address, such as http://localhost:8000/v1")
    group.addoption("--model", help="the model to ask for; by default the first that the server lists")
    group.addoption("--api-key", default="unused", help="the key to send")
    parser.addoption(
        "--pictures", help="where tests/e2e/test_console.py puts its pictures; by default nowhere"
    )


def pytest_collection_finish() -> None:
    """Spares the garbage collector a million objects of imported modules, which stay whatever it finds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Iterator[Service]:
    """A real `pagewire serve` of SmolLM2 with default settings, shared by the session: in its file's own
    precision."""
    with Service(tmp_path_factory.mktemp("serve")) as service:
        yield service


@pytest.fixture(scope="session")
def float32_server(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Iterator[Service]:
    """The same in float32, shared by the session: for what is compared with transformers."""
    with Service(tmp_path_factory.mktemp("float32"), options=("--dtype", "float32")) as service:
        yield service


@pytest.fixture(scope="session")
def null_service(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Iterator[Service]:
    """A real `pagewire serve --engine null`, shared by the session: for whatever needs no model. It has room
    for answers of 100,000 tokens and makes steps as fast as they are asked for."""
    options = ("--engine", "null", "--max-model-len", "131072")
    with Service(tmp_path_factory.mktemp("null"), options=options) as service:
        yield service


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct in Hugging Face layout. It comes from the user's cache, and is fetched once."""
    return resolve_model(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def smollm2_float32_dir() -> Path:
    """The same with its weights dequantized to float32, as other programs read them."""
    return resolve_model(DEFAULT_MODEL, dequantized=True)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file that `smollm2_dir` was converted from."""
    return gguf_file(ALIASES[DEFAULT_MODEL])
