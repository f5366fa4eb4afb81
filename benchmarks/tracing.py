"""What tracing every request costs the processes that serve, and what a scrape of /metrics costs.

Two real `pagewire serve --engine null`, one with --otlp-traces-endpoint and one without, take turns of a few
seconds under the same load, so that both see the same machine. A cost is the ratio, on to off, of the
processor time for a token that frontend, scheduler and worker take together; each round has one, and their
median counts.
The processes that export spans run beside them at low priority: their processor time is told by itself.

On a machine with other work that ratio is mostly noise. So the code that runs for a request, where tracing is
off and where it is on, is timed by itself, too, in the fastest of many runs: `own_work`.
"""

from __future__ import annotations

import argparse
import asyncio
import marshal
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any, cast

import httpx
import psutil
import uvloop

from benchmarks import record
from benchmarks.stream_load import Load, connect_all
from engine.dispatch.records import NewRequest, StepPlan, StepResult
from engine.dispatch.sampling import SamplingRecord, u32
from engine.worker.requests import OpenRequests
from frontend.tracing import FrontendTracing
from pagewire.telemetry.context import new_trace, of_traceparent
from pagewire.telemetry.spans import Attributes, Span, SpanWriter, packed
from scheduler.request import EndReason, Request
from scheduler.serve.outbox import Outbox, Ticket
from scheduler.serve.tracing import write_spans
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
    fastest_off, fastest_on = (
        median(sorted(each["all"] for each in windows)[: quarter or 1]) for windows in (offs, ons)
    )
    return {
        "clients": load[1],
        "tokens_of_an_answer": load[2],
        "cost": round(median(ratios) - 1, 4),
        "cost_fastest_quarter": round(fastest_on / fastest_off - 1, 4),
        "cost_middle_half": [round(ratios[quarter] - 1, 4), round(ratios[-1 - quarter] - 1, 4)],
        "cpu_us_per_request_off_fastest_quarter": round(fastest_off * load[2]),
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


class Discard:
    """Stands for a SpanWriter: does in `add` what its thread would do."""

    def add(self, span: Span) -> None:
        """Packs the span and writes it nowhere."""
        marshal.dumps(packed(span))

    def call_between_batches(self, call: Callable[[], None]) -> None:
        """Never."""


def own_work() -> dict[str, dict[str, float]]:
    """Microseconds of each process for what tracing adds to a request, where it is off and where it is on."""
    discard = cast(SpanWriter, Discard())
    return {
        "frontend": {"off": best(frontend_work(None)), "on": best(frontend_work(discard))},
        "scheduler": {"off": best(scheduler_work(None)), "on": best(scheduler_work(discard))},
        "engine-worker": {"off": best(worker_work(None)), "on": best(worker_work(discard))},
    }


def best(work: Callable[[], None], times: int = 300, runs: int = 60) -> float:
    """Microseconds of processor time, in the fastest of many runs."""
    fastest = float("inf")
    for _ in range(runs):
        began = time.process_time_ns()
        for _ in range(times):
            work()
        fastest = min(fastest, time.process_time_ns() - began)
    return round(fastest / times / 1e3, 2)


def frontend_work(spans: SpanWriter | None) -> Callable[[], None]:
    """A call's context and spans."""
    tracing = FrontendTracing(spans)

    def work() -> None:
        context = tracing.begin("request", None, None)
        if context.trace is None:
            return
        context.trace.traceparent  # noqa: B018
        now = time.perf_counter()
        tracing.answered("stop", began=now, submitted_at=now, first_token_at=now, num_output_tokens=9)
        attributes: Attributes = {"http.request.method": "POST", "http.route": "/v1/completions"}
        tracing.ended(context, "POST /v1/completions", attributes | {"http.response.status_code": 200})

    return work


def scheduler_work(spans: SpanWriter | None) -> Callable[[], None]:
    """A request's ticket and spans."""
    request = Request("request", array("I", [1, 2, 3]), 2, SamplingRecord(), max_total_tokens=9)
    request.end(EndReason.STOP)
    outbox, traceparent = Outbox(), new_trace().traceparent

    def work() -> None:
        ticket = Ticket(outbox, 1, 1.0, 2.0, 3.0, 4.0)
        if spans is not None:
            ticket.trace = of_traceparent(traceparent).child()
            ticket.trace.to_bytes()
            write_spans(spans, request, ticket, 5.0)

    return work


def worker_work(spans: SpanWriter | None) -> Callable[[], None]:
    """A request's two plans in which it enters a row and leaves it."""
    requests = OpenRequests(spans)
    one, row, none = u32([1]), u32([3]), u32([])
    trace = b"" if spans is None else new_trace().to_bytes()
    new = NewRequest(3, u32([1, 2]), 2, u32([0]), SamplingRecord(), 0, "request", trace)
    first = StepPlan(0, none, [new], row, one, one, one, none, none)
    last = StepPlan(1, row, [], none, none, none, none, none, none)
    results = StepResult(0, none), StepResult(1, none)

    def work() -> None:
        for plan, result in zip((first, last), results, strict=True):
            requests.planned(plan)
            requests.finished(result)

    return work


def main() -> None:
    """Measures and reports."""
    parser: argparse.ArgumentParser = record.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="of each load")
    arguments = parser.parse_args()
    base = ("--engine", "null", "--null-step-ms", STEP_MS, "--no-access-log")
    base += ("--max-connection-age", "3600")
    results: dict[str, Any] = {"rounds": arguments.rounds, "us_for_a_request_by_itself": own_work()}
    print(results, file=sys.stderr, flush=True)
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
