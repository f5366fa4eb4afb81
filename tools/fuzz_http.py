"""Sends what schemathesis makes of /openapi.json, valid and invalid, and looks for 5xx, hangs and crashes.

python -m tools.fuzz_http --seconds 300 --seed 1

A request fails the run if its answer is a 5xx, has a status or a form that the document does not tell of, or
does not come within 30 s. At the end a completion must be what it was at the beginning, and nothing may have
been restarted. Without --base-url a service of a tiny model is started.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import httpx

from tools.fuzz_service import harm, process_ids, start_service

_CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
_ANSWER_SECONDS = 30


def fuzz(base_url: str, seconds: int, seed: int, directory: Path) -> int:
    """Runs schemathesis; its exit status."""
    probe = {"prompt": [1, 2, 3], "max_tokens": 8, "temperature": 0}

    def completion() -> str:
        answer = httpx.post(f"{base_url}/v1/completions", json=probe, timeout=60).json()
        return str(answer["choices"])

    before = completion()
    report = directory / "events.ndjson"
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{base_url}/openapi.json"),
        *("--checks", _CHECKS, "--max-time", str(seconds), "--seed", str(seed)),
        *("--request-timeout", str(_ANSWER_SECONDS), "--continue-on-failure"),
        *("--exclude-path", "/engine/events"),  # never ends
        *("--phases", "examples,coverage,fuzzing", "--suppress-health-check", "all", "--no-shrink"),
        *("--report", "ndjson", "--report-ndjson-path", str(report)),
    ]
    status = subprocess.run(command, check=False).returncode
    print("answers by status:", dict(sorted(_statuses(report).items())))
    after = completion()
    if after != before:
        print("a completion is not what it was before:", before, after, sep="\n")
        return 1
    return status


def _statuses(report: Path) -> Counter[int]:
    """How many answers had each status."""
    counts: Counter[int] = Counter()

    def count(node: object) -> None:
        if isinstance(node, dict):
            if isinstance(status := node.get("status_code"), int):
                counts[status] += 1
            for value in node.values():
                count(value)
        elif isinstance(node, list):
            for value in node:
                count(value)

    with report.open() as lines:
        for line in lines:
            count(json.loads(line))
    return counts


def main() -> int:
    """The exit status: 0 if nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--base-url")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if arguments.base_url:
            return fuzz(arguments.base_url.rstrip("/"), arguments.seconds, arguments.seed, directory)
        with start_service(directory) as service:
            before = process_ids(service)
            status = fuzz(service.http_url, arguments.seconds, arguments.seed, directory)
            suffered = harm(service, before)
        print("\n".join(suffered) or "no process was restarted, no traceback was logged")
        return 1 if suffered else status


if __name__ == "__main__":
    sys.exit(main())
