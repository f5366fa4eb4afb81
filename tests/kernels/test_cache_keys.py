"""Under which keys compiled kernels are kept: the same in every process, whatever it compiles first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

KEYS = """
import importlib, json, pkgutil, sys
import engine.kernels
from triton import JITFunction

modules = [each.name for each in pkgutil.walk_packages(engine.kernels.__path__, "engine.kernels.")]
functions = {
    f"{name}:{function.__name__}": function
    for name in modules
    for function in vars(importlib.import_module(name)).values()
    if isinstance(function, JITFunction) and function.__module__ == name
}
names = sorted(functions, reverse="reversed" in sys.argv)
print(json.dumps({name: functions[name].cache_key for name in names}))
"""


def keys(*arguments: str) -> dict[str, str]:
    """Of every kernel and what kernels call, found in the order of their names, or in the reverse one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", KEYS, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found: dict[str, str] = json.loads(run.stdout)
    return found


@pytest.mark.slow
def test_a_kernels_key_does_not_depend_on_what_was_compiled_before() -> None:
    forward, backward = keys(), keys("reversed")
    assert len(forward) > 20
    assert {name for name in forward if forward[name] != backward[name]} == set()
