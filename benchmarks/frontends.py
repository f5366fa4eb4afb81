"""What frontend and scheduler cost, with the null engine behind them: tokens/s and requests/s for each core.

A real `pagewire serve --engine null` and a client that costs little (stream_load.py). On a shared machine
processor time says more than the time on the wall: a frontend's rate for each core is what came divided by
the processor time that the frontend took for it (/proc/PID/stat). Streams are measured between two moments at
which all of them are open: paced, so that every token is a message of its own, and as fast as it can be,
where tokens that wait for a frontend share a message.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks import record
from tools.service import Service, processor_seconds

STREAMS = 256
PACED_STEP_MS = 40
SECONDS = 6.0
REQUEST_TOKENS = 16
MANY_STREAMS = 10_000
MANY_STEP_MS = 4000
SETTLE_SECONDS = 5.0
FAST_BLOCKS = 1 << 20
ROLES = ("frontend", "scheduler", "engine-worker")


def rss_mib(pid: int) -> float:
    """Resident memory of a process, without pages that it shares with files or others."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


class Client:
    """The process that reads."""

    def __init__(self, port: str, kind: str, *arguments: str) -> None:
        command = [sys.executable, "-m", "benchmarks.stream_load", kind, "--port", port, *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def next(self) -> dict[str, Any]:
        """Lets it go on to its next report."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the client failed")
        report: dict[str, Any] = json.loads(line)
        return report

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


@contextmanager
def client(service: Service, kind: str, *arguments: str) -> Iterator[Client]:
    """A client whose streams are all open when its first report has been read."""
    url = service.grpc_target if kind.startswith("grpc") else service.http_url
    reader = Client(url.rpartition(":")[2], kind, *arguments)
    try:
        yield reader
    finally:
        reader.close()


def measure(service: Service, kind: str, *arguments: str) -> dict[str, Any]:
    """What comes in SECONDS, and what it costs whom."""
    with client(service, kind, *arguments) as reader:
        reader.next()
        tokens = service.metrics()["pagewire:generation_tokens_total"]
        before = service.processor_seconds()
        time.sleep(SECONDS)
        after = service.processor_seconds()
        cpu = {role: after[role] - before[role] for role in ROLES}
        tokens = service.metrics()["pagewire:generation_tokens_total"] - tokens
        came = reader.next()
    per_core = tokens / cpu["frontend"]
    result: dict[str, Any] = {
        "tokens_per_s": round(tokens / came["seconds"]),
        "tokens_per_s_per_frontend_core": round(per_core),
        "cpu_us_per_token": {role: round(seconds / tokens * 1e6, 2) for role, seconds in cpu.items()},
        "cpu_us_per_token_client": round(came["cpu_seconds"] / tokens * 1e6, 2),
        "frontend_cores": round(cpu["frontend"] / SECONDS, 2),
    }
    if came["answers"]:
        result["requests_per_s"] = round(came["answers"] / came["seconds"])
        result["requests_per_s_per_frontend_core"] = round(came["answers"] / cpu["frontend"])
    else:
        result["tokens_per_message"] = round(tokens / came["messages"], 2)
    print(f"{kind}: {result}", file=sys.stderr, flush=True)
    return result


def floor(kind: str) -> dict[str, Any]:
    """What a server takes for each message that does nothing but write (stream_floor.py)."""
    command = [sys.executable, "-m", "benchmarks.stream_floor", kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            reader = Client(server.stdout.readline().strip(), kind)
            reader.next()
            process = psutil.Process(server.pid)
            cpu = processor_seconds(process)
            time.sleep(SECONDS)
            cpu = processor_seconds(process) - cpu
            came = reader.next()
            reader.close()
        finally:
            server.kill()
    result = {
        "messages_per_s": round(came["messages"] / came["seconds"]),
        "cpu_us_per_message": round(cpu / came["messages"] * 1e6, 2),
        "messages_per_s_per_core": round(came["messages"] / cpu),
    }
    print(f"floor of {kind}: {result}", file=sys.stderr, flush=True)
    return result


def memory(service: Service, kind: str) -> dict[str, Any]:
    """What MANY_STREAMS open streams add to the memory of each process."""
    pids = {role: service.processes()[role].pid for role in ROLES}
    before = {role: rss_mib(pid) for role, pid in pids.items()}
    began = time.perf_counter()
    with client(service, kind, "--streams", str(MANY_STREAMS)) as reader:
        reader.next()
        opened = time.perf_counter() - began
        time.sleep(SETTLE_SECONDS)
        running = service.metrics()["pagewire:num_requests_running"]
        after = {role: rss_mib(pid) for role, pid in pids.items()}
        came = reader.next()
    return {
        "open_s": round(opened, 1),
        "running": running,
        "messages_per_s": round(came["messages"] / came["seconds"]),
        "mib_before": {role: round(value) for role, value in before.items()},
        "mib_open": {role: round(value) for role, value in after.items()},
        "kib_per_stream": {
            role: round((after[role] - before[role]) * 1024 / MANY_STREAMS, 1) for role in ROLES
        },
        "gib_all": round(sum(after.values()) / 1024, 2),
    }


def main() -> None:
    """Measures and reports."""
    parser = record.parser(__doc__)
    parser.add_argument(
        "--only", default="floor,paced,fast,requests,memory", help="parts, with commas between them"
    )
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    results: dict[str, Any] = {}
    base = ("--engine", "null", "--max-model-len", "131072", "--no-access-log")
    base += ("--max-connection-age", "3600")  # the client opens its connections once
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if "floor" in parts:
            results[f"{STREAMS} streams, servers that only write"] = {
                kind: floor(kind) for kind in ("sse", "grpc")
            }
        if "paced" in parts:
            with Service(directory, options=(*base, "--null-step-ms", str(PACED_STEP_MS))) as service:
                results[f"{STREAMS} streams, a step every {PACED_STEP_MS} ms"] = {
                    kind: measure(service, kind) for kind in ("sse", "grpc")
                }
        if "fast" in parts or "requests" in parts:
            # As fast as they can be, streams would fill the usual pool in seconds, and wait for each other.
            with Service(directory, options=(*base, "--num-blocks", str(FAST_BLOCKS))) as service:
                if "fast" in parts:
                    results[f"{STREAMS} streams, as fast as they can be"] = {
                        kind: measure(service, kind) for kind in ("sse", "grpc")
                    }
                if "requests" in parts:
                    again = ("--again", "--max-tokens", str(REQUEST_TOKENS))
                    results[f"{STREAMS} clients, requests of {REQUEST_TOKENS} tokens"] = {
                        kind: measure(service, kind, *again) for kind in ("sse", "http", "grpc", "grpc-once")
                    }
        if "memory" in parts:
            many = ("--max-num-seqs", str(MANY_STREAMS), "--max-num-batched-tokens", str(4 * MANY_STREAMS))
            many += ("--max-num-waiting", str(MANY_STREAMS), "--null-step-ms", str(MANY_STEP_MS))
            for kind in ("sse", "grpc"):
                with Service(directory, options=(*base, *many)) as service:
                    results[f"{MANY_STREAMS} open streams, {kind}"] = memory(service, kind)
    record.write(arguments.json, results)


if __name__ == "__main__":
    main()
