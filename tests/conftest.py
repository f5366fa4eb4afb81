"""Fixtures that every kind of test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from pagewire.hub import ALIASES, DEFAULT_MODEL, resolve_model
from pagewire.hub.resolve import gguf_file

# As in the worker (engine/cli.py): threads that spin while they wait steal time from whatever else runs on
# the machine. It is read when torch is first imported, so it must be set before.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Without a GPU Triton's kernels run in its interpreter, which is chosen when they are first imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Examples are not timed: on a busy machine any of them may take long once.
settings.register_profile("pagewire", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pagewire")


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct in Hugging Face layout. It comes from the user's cache, and is fetched once."""
    return resolve_model(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file that `smollm2_dir` was converted from."""
    return gguf_file(ALIASES[DEFAULT_MODEL])
