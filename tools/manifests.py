"""Writes deploy/kubernetes/pagewire.yaml: what the Helm chart renders to with its own values.

python -m tools.manifests [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from helm_python import Chart

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "deploy" / "helm" / "pagewire"
MANIFESTS = ROOT / "deploy" / "kubernetes" / "pagewire.yaml"
_HEADER = (
    "# What deploy/helm/pagewire renders to with its own values; written by `python -m tools.manifests`.\n"
)


def rendered(values: dict[str, Any] | None = None, name: str = "demo", namespace: str = "default") -> str:
    """The chart's manifests, one YAML document after another.

    Raises:
        HelmError: a template is wrong.
    """
    manifests = Chart.load(CHART).render(values=values or {}, name=name, namespace=namespace)
    return "---\n".join(text.strip() + "\n" for _, text in sorted(manifests.items()) if text.strip())


def main() -> int:
    """Writes the file; with --check, the status says whether it is as it should be."""
    wanted = _HEADER + rendered(name="demo")
    if "--check" in sys.argv:
        return 0 if MANIFESTS.read_text() == wanted else 1
    MANIFESTS.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
