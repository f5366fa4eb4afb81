"""Asks for answers of random JSON schemas, and validates them.

python -m tools.random_schemas --count 200 --seed 1 [--base-url http://localhost:8000]

Prints how many answers are valid, how many schemas were refused (and why), and how many answers were cut off
by --max-tokens. An answer that is not valid is wrong, and so is every other end; both are printed. Without
--base-url a service of the default model is started.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.conformance.schemas import judge, random_schema
from tools.service import Service


def run(base_url: str, numbers: range, max_tokens: int, concurrency: int) -> int:
    """Tries the schemas of these numbers; 0 if nothing was wrong."""
    began = time.monotonic()
    with httpx.Client(base_url=base_url, timeout=600) as client, ThreadPoolExecutor(concurrency) as pool:
        outcomes = list(
            pool.map(lambda number: judge(client, random_schema(number), number, max_tokens), numbers)
        )
    counts = Counter(outcome.kind for outcome in outcomes)
    for number, outcome in zip(numbers, outcomes, strict=True):
        if outcome.kind != "valid":
            print(f"{number}: {outcome.kind}: {outcome.detail}\n    {json.dumps(random_schema(number))}")
    tokens = sum(outcome.num_tokens for outcome in outcomes)
    print(f"{len(outcomes)} schemas, {tokens} tokens in {time.monotonic() - began:.0f} s: {dict(counts)}")
    return 1 if counts["wrong"] else 0


def main() -> int:
    """The exit status: 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--base-url")
    arguments = parser.parse_args()
    numbers = range(arguments.seed * 100_000, arguments.seed * 100_000 + arguments.count)
    if arguments.base_url:
        return run(arguments.base_url, numbers, arguments.max_tokens, arguments.concurrency)
    with tempfile.TemporaryDirectory() as name, Service(Path(name)) as service:
        return run(service.http_url, numbers, arguments.max_tokens, arguments.concurrency)


if __name__ == "__main__":
    sys.exit(main())
