"""Prompts with shared beginnings before two replicas: by the longest cached prefix, and by turns.

python -m benchmarks.replicas --json benchmarks/results/replicas.json

Two replicas of a model on this machine; a frontend before both chooses by prefixes, and two more, each before
one replica, are asked by turns, which is round robin. Every prompt begins with one of several long texts. The
two ways share the replicas but no cached block: each has a cache salt of its own.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import httpx

from benchmarks import record
from pagewire.base.own_packages import python_command, python_path
from pagewire.bench.percentiles import percentile
from tools.service import free_ports

READY_SECONDS = 180.0


def start(log: Path, *words: str) -> subprocess.Popen[bytes]:
    """Starts a `pagewire` command."""

    with log.open("wb") as output:
        return subprocess.Popen(
            [*python_command("pagewire"), *words],
            stdout=output,
            stderr=output,
            env={**os.environ, **python_path()},
        )


def until_healthy(url: str, total: int) -> None:
    """Waits until a frontend sends requests to so many replicas."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health", timeout=5).json()["healthy"] == total:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(0.2)
    raise TimeoutError(f"{url} is not ready")


def ask(url: str, prompt: list[int], salt: str) -> tuple[float, int, int]:
    """Seconds to the first token, cached tokens and prompt tokens."""
    body = {
        "prompt": prompt,
        "max_tokens": 8,
        "ignore_eos": True,
        "temperature": 0,
        "cache_salt": salt,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, usage = time.perf_counter(), 0.0, {}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=300) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - began
                usage = json.loads(line[6:]).get("usage") or usage
    return first, usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]


def prompts(arguments: Any) -> list[list[int]]:
    """In random order, so that by turns a beginning meets either replica."""
    generator = random.Random(1)
    beginnings = [
        [generator.randrange(300, 40_000) for _ in range(arguments.shared_tokens)]
        for _ in range(arguments.beginnings)
    ]
    return [
        [*generator.choice(beginnings), *(generator.randrange(300, 40_000) for _ in range(16))]
        for _ in range(arguments.requests)
    ]


def measure(urls: list[str], asked: list[list[int]], salt: str, at_once: int) -> dict[str, float]:
    """Asks all prompts, the frontends in turn."""
    turns = count()
    with ThreadPoolExecutor(at_once) as pool:
        answers = list(pool.map(lambda prompt: ask(urls[next(turns) % len(urls)], prompt, salt), asked))
    seconds = [each[0] for each in answers]
    return {
        "hit_rate": round(sum(each[1] for each in answers) / sum(each[2] for each in answers), 4),
        "ttft_p50_ms": round(percentile(seconds, 50) * 1e3, 1),
        "ttft_p99_ms": round(percentile(seconds, 99) * 1e3, 1),
    }


def main() -> None:
    """Runs both and prints the record."""
    parser = record.parser(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--beginnings", type=int, default=8)
    parser.add_argument("--shared-tokens", type=int, default=512)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--at-once", type=int, default=2)
    arguments = parser.parse_args()
    port, *ports = free_ports(8)
    listen = next(each for each in (port, *ports) if each + 1 < 65_536)
    schedulers = [f"127.0.0.1:{listen}", f"127.0.0.1:{listen + 1}"]
    processes = []
    with tempfile.TemporaryDirectory() as directory:
        try:
            words = (
                "serve",
                arguments.model,
                "-dp",
                "2",
                "--frontends",
                "0",
                "--scheduler-listen",
                schedulers[0],
            )
            processes.append(start(Path(directory) / "replicas.log", *words))
            urls = []
            for number, behind in enumerate((",".join(schedulers), *schedulers)):
                http, grpc = ports[2 * number : 2 * number + 2]
                words = ("frontend", arguments.model, "--schedulers", behind, "--host", "127.0.0.1")
                processes.append(
                    start(
                        Path(directory) / f"{number}.log",
                        *words,
                        "--port",
                        str(http),
                        "--grpc-port",
                        str(grpc),
                    )
                )
                urls.append(f"http://127.0.0.1:{http}")
            for url, total in zip(urls, (2, 1, 1), strict=True):
                until_healthy(url, total)
            asked = prompts(arguments)
            results = {
                "round_robin": measure(urls[1:], asked, "turns", arguments.at_once),
                "longest_prefix": measure(urls[:1], asked, "prefix", arguments.at_once),
            }
        except TimeoutError:
            for log in Path(directory).glob("*.log"):
                print(log.read_text(errors="replace")[-2000:], file=sys.stderr)
            raise
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            for process in processes:
                process.wait(60)
    record.write(arguments.json, results)


if __name__ == "__main__":
    main()
