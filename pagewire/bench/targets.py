"""The figures to beat: the fastest peer's and the project's own goals, for the bundled shapes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

_PATH = Path(__file__).parent / "targets.json"


@cache
def _all() -> dict[str, Any]:
    targets: dict[str, Any] = json.loads(_PATH.read_text(encoding="utf-8"))
    return targets


def peer() -> dict[str, str]:
    """Who the peer is, and where its figures were measured."""
    return {name: _all()[name] for name in ("peer", "measured")}


def settings() -> dict[str, Any]:
    """The engine options under which the peer was measured, by WorkerConfig field."""
    return dict(_all()["settings"])


def throughput_targets(model: str, workload: str) -> dict[str, float]:
    """`peer` and `goal` of a workload, in tokens per second; empty where there are none."""
    return dict(_all()["shapes"].get(model, {}).get("workloads", {}).get(workload, {}))


def startup_targets(model: str) -> dict[str, dict[str, float]]:
    """`peer` and `goal` of "cold" and "warm" starts, in seconds to ready; empty where there are none."""
    return dict(_all()["shapes"].get(model, {}).get("startup", {}))


def served_targets(model: str) -> dict[str, dict[str, dict[str, float]]]:
    """`peer` and `goal` of the served cases, by case and measure; empty where there are none."""
    return dict(_all()["shapes"].get(model, {}).get("served", {}))
