"""The service that most end-to-end tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.service import Service


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Iterator[Service]:
    """A real `pagewire serve` of SmolLM2 in float32 with default limits, shared by the session."""
    with Service(tmp_path_factory.mktemp("serve")) as service:
        yield service
