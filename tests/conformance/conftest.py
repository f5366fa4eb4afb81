"""Which server is under test: `--base-url`, or one that the suite starts itself.

    pytest tests/conformance --base-url http://localhost:8000 [--model NAME] [--api-key KEY]

Tests marked `extension` (`-m "not extension"` leaves them out) send fields that OpenAI's API does not have,
vLLM's mostly. Those that compare with transformers have a server of
their own, in float32; with `--base-url` they are skipped.
"""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.conformance.reference import Reference
from tests.conformance.target import Target


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest) -> Target:
    """The server under test."""
    url, key = request.config.getoption("--base-url"), request.config.getoption("--api-key")
    if url is None:
        server = request.getfixturevalue("server")
        return Target(server.http_url, server.model, directory=request.getfixturevalue("smollm2_float32_dir"))
    root = url.rstrip("/").removesuffix("/v1")
    model = request.config.getoption("--model")
    if model is None:
        listed = httpx.get(f"{root}/v1/models", headers={"authorization": f"Bearer {key}"}, timeout=30)
        model = listed.json()["data"][0]["id"]
    return Target(root, model, key)


@pytest.fixture(scope="session")
def model_directory(target: Target) -> Path:
    """The model's files; without them a test is skipped."""
    if target.directory is None:
        pytest.skip("compares with transformers, which needs the suite's own server")
    return target.directory


@pytest.fixture(scope="session")
def float32_target(request: pytest.FixtureRequest, model_directory: Path) -> Target:
    """A server of the suite's own that computes in float32."""
    server = request.getfixturevalue("float32_server")
    return Target(server.http_url, server.model, directory=model_directory)


@pytest.fixture(scope="session")
def reference(model_directory: Path) -> Reference:
    """transformers' model, in float32 as `float32_target`'s."""
    return Reference(model_directory)
