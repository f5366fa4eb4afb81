"""What tracing every request costs the processes that serve, and what a scrape of /metrics costs.

Two real `pagewire serve --engine null`, one with --otlp-traces-endpoint and one without, take turns of a few
seconds under the same load, so that both see the same machine. A cost is the ratio, on to off, of the
processor time for a token that frontend, scheduler and worker take together; each round has one, and their
median counts.
The processes that export spans run beside them at low priority: their processor time is told by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
import uvloop

from benchmarks import record
from benchmarks.stream_load import Load, connect_all
from tools.service import Service, processor_seconds

ROLES = ("frontend", "scheduler", "engine-worker")
SETTLE_SECONDS, SECONDS = 0.3, 2.5
SCRAPES = 50
LOADS = {
    # kind, clients, tokens of an answer
    "SSE": ("sse", 16, 128),
    "gRPC Generate": ("grpc", 16, 128),
    "HTTP, whole, short": ("http", 16, 16),
}
STEP_MS = "2"


class Sink(BaseHTTPRequestHandler):
    """Takes spans and forgets them."""

    def do_POST(self) -> None:
        """An export."""
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing to say."""


@contextmanager
def sink() -> Iterator[str]:
    """An OTLP endpoint."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Sink)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces"
    finally:
        server.shutdown()


def exporter_seconds(service: Service) -> float:
    """Processor time of the processes that export spans."""
    children = psutil.Process(service.process.pid).children(recursive=True)
    exporters = [each for each in children if "pagewire.telemetry.exporter" in each.cmdline()]
    return sum(map(processor_seconds, exporters))


def tokens_of(service: Service) -> float:
    """Tokens generated so far."""
    return service.metrics()["pagewire:generation_tokens_total"]


async def window(service: Service, kind: str, clients: int, max_tokens: int) -> dict[str, float]:
    """Microseconds of processor time for a token, while clients ask again and again: of each role, of all
    that serve, and of the exporters; and tokens a second.
    """
    load = Load(max_tokens, True, clients)
    address = service.grpc_target if kind.startswith("grpc") else service.http_url
    transports = await connect_all(load, kind, "127.0.0.1", int(address.rpartition(":")[2]))
    await load.all_begun.wait()
    await asyncio.sleep(SETTLE_SECONDS)
    began, exporters, before = time.perf_counter(), exporter_seconds(service), service.processor_seconds()
    tokens = await asyncio.to_thread(tokens_of, service)
    await asyncio.sleep(SECONDS)
    tokens = await asyncio.to_thread(tokens_of, service) - tokens
    after, exporters = service.processor_seconds(), exporter_seconds(service) - exporters
    seconds = time.perf_counter() - began
    load.again = False
    for transport in transports:
        transport.close()
    costs = {role: (after[role] - before[role]) / tokens * 1e6 for role in ROLES}
    costs["all"] = sum(costs.values())
    return {**costs, "exporters": exporters / tokens * 1e6, "tokens_per_s": tokens / seconds}


def run_window(service: Service, load: tuple[str, int, int]) -> dict[str, float]:
    """See `window`."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(window(service, *load))


def compare(off: Service, on: Service, load: tuple[str, int, int], rounds: int) -> dict[str, Any]:
    """Both services under a load, in turns."""
    offs: list[dict[str, float]] = []
    ons: list[dict[str, float]] = []
    turns = [(off, offs), (on, ons)]
    for service, _ in turns:
        run_window(service, load)  # warm
    for number in range(rounds):
        for service, windows in turns if number % 2 == 0 else reversed(turns):
            windows.append(run_window(service, load))
    ratios = sorted(after["all"] / before["all"] for before, after in zip(offs, ons, strict=True))
    quarter = len(ratios) // 4
    names = (*ROLES, "all")
    return {
        "clients": load[1],
        "tokens_of_an_answer": load[2],
        "cost": round(median(ratios) - 1, 4),
        "cost_middle_half": [round(ratios[quarter] - 1, 4), round(ratios[-1 - quarter] - 1, 4)],
        "cpu_us_per_token_off": {name: round(median(each[name] for each in offs), 2) for name in names},
        "cpu_us_per_token_on": {name: round(median(each[name] for each in ons), 2) for name in names},
        "cpu_us_per_token_exporters": round(median(each["exporters"] for each in ons), 2),
        "tokens_per_s_off": round(median(each["tokens_per_s"] for each in offs)),
        "tokens_per_s_on": round(median(each["tokens_per_s"] for each in ons)),
    }


def scrape(service: Service) -> dict[str, Any]:
    """What one scrape of /metrics costs frontend and scheduler."""
    url = f"{service.http_url}/metrics"
    body = httpx.get(url, timeout=30).content
    before, began = service.processor_seconds(), time.perf_counter()
    for _ in range(SCRAPES):
        httpx.get(url, timeout=30)
    seconds = (time.perf_counter() - began) / SCRAPES
    after = service.processor_seconds()
    costs = {role: round((after[role] - before[role]) / SCRAPES * 1e3, 2) for role in ROLES[:2]}
    return {"bytes": len(body), "ms": round(seconds * 1e3, 2), "cpu_ms": costs}


def main() -> None:
    """Measures and reports."""
    parser: argparse.ArgumentParser = record.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="of each load")
    arguments = parser.parse_args()
    base = ("--engine", "null", "--null-step-ms", STEP_MS, "--no-access-log")
    base += ("--max-connection-age", "3600")
    results: dict[str, Any] = {"rounds": arguments.rounds}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        endpoint = stack.enter_context(sink())
        off = stack.enter_context(Service(Path(name), options=base))
        on = stack.enter_context(Service(Path(name), options=(*base, "--otlp-traces-endpoint", endpoint)))
        results["a scrape of /metrics"] = scrape(off)
        for title, load in LOADS.items():
            results[title] = compare(off, on, load, arguments.rounds)
            print(f"{title}: {results[title]}", file=sys.stderr, flush=True)
    record.write(arguments.json, results)


if __name__ == "__main__":
    main()
