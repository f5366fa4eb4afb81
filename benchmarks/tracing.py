"""What tracing every request costs the processes that serve, and what a scrape of /metrics costs.

Two real `pagewire serve --engine null`, one with --otlp-traces-endpoint and one without, take turns under the
same load, so that both see the same machine. A cost is the ratio of the processor time that frontend, scheduler
and worker take together for a token, on to off, in each round; the median of the rounds counts. The processes
that export spans run beside them at low priority; their processor time is told by itself.
"""

from __future__ import annotations

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

from benchmarks import record
from benchmarks.frontends import ROLES, measure
from tools.service import Service, processor_seconds

LOADS = {
    "64 clients, SSE, answers of 256 tokens, a step every 20 ms": (
        ("--null-step-ms", "20"),
        ("sse", "--streams", "64", "--again", "--max-tokens", "256"),
    ),
    "64 clients, gRPC, answers of 256 tokens, a step every 20 ms": (
        ("--null-step-ms", "20"),
        ("grpc", "--streams", "64", "--again", "--max-tokens", "256"),
    ),
    "64 clients, HTTP, answers of 16 tokens, as fast as it can be": (
        (),
        ("http", "--streams", "64", "--again", "--max-tokens", "16"),
    ),
}
SCRAPES = 50


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
    return sum(
        processor_seconds(each) for each in children if "pagewire.telemetry.exporter" in each.cmdline()
    )


def window(service: Service, load: tuple[str, ...]) -> dict[str, float]:
    """Microseconds for a token: of each role, of all that serve, and of the exporters."""
    exporters = exporter_seconds(service)
    began = service.metrics()["pagewire:generation_tokens_total"]
    result = measure(service, *load)
    tokens = service.metrics()["pagewire:generation_tokens_total"] - began
    costs = dict(result["cpu_us_per_token"])
    costs["all"] = sum(costs[role] for role in ROLES)
    costs["exporters"] = (exporter_seconds(service) - exporters) / tokens * 1e6
    costs["tokens_per_s"] = result["tokens_per_s"]
    return costs


def compare(directory: Path, options: tuple[str, ...], load: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Both services under a load, in turns."""
    base = ("--engine", "null", "--no-access-log", "--max-connection-age", "3600", *options)
    with ExitStack() as stack:
        endpoint = stack.enter_context(sink())
        off = stack.enter_context(Service(directory, options=base))
        on = stack.enter_context(Service(directory, options=(*base, "--otlp-traces-endpoint", endpoint)))
        offs: list[dict[str, float]] = []
        ons: list[dict[str, float]] = []
        for service in (off, on):
            measure(service, *load)  # warm
        for number in range(rounds):
            turns = [(off, offs), (on, ons)]
            for service, windows in turns if number % 2 == 0 else reversed(turns):
                windows.append(window(service, load))
    ratios = [after["all"] / before["all"] for before, after in zip(offs, ons, strict=True)]
    names = (*ROLES, "all")
    return {
        "cost": round(median(ratios) - 1, 4),
        "cost_each_round": [round(ratio - 1, 4) for ratio in ratios],
        "cpu_us_per_token_off": {name: round(median(each[name] for each in offs), 2) for name in names},
        "cpu_us_per_token_on": {name: round(median(each[name] for each in ons), 2) for name in names},
        "cpu_us_per_token_exporters": round(median(each["exporters"] for each in ons), 2),
        "tokens_per_s_off": round(median(each["tokens_per_s"] for each in offs)),
        "tokens_per_s_on": round(median(each["tokens_per_s"] for each in ons)),
    }


def scrape(directory: Path) -> dict[str, Any]:
    """What one scrape of /metrics costs frontend and scheduler."""
    with Service(directory, options=("--engine", "null", "--no-access-log")) as service:
        url = f"{service.http_url}/metrics"
        body = httpx.get(url, timeout=30).content
        before, began = service.processor_seconds(), time.perf_counter()
        for _ in range(SCRAPES):
            httpx.get(url, timeout=30)
        seconds = (time.perf_counter() - began) / SCRAPES
        after = service.processor_seconds()
    return {
        "bytes": len(body),
        "ms": round(seconds * 1e3, 2),
        "cpu_ms": {role: round((after[role] - before[role]) / SCRAPES * 1e3, 2) for role in ROLES[:2]},
    }


def main() -> None:
    """Measures and reports."""
    parser = record.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of each load")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        results["a scrape of /metrics"] = scrape(Path(name))
        for title, (options, load) in LOADS.items():
            results[title] = compare(Path(name), options, load, arguments.rounds)
            print(f"{title}: {results[title]}", file=sys.stderr, flush=True)
    record.write(arguments.json, results)


if __name__ == "__main__":
    main()
