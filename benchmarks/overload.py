"""What a service does with more than it can serve, and with clients that are none.

1. Overload: the null engine, whose rows and step time set what can be sustained; the most that it serves to
   clients that wait their turn, then 50 times as many requests a second for a minute, over HTTP and gRPC.
   Every request has to end, in an answer or in a typed refusal that says when to come again; memory has to
   stay flat, and what is served has to stay at the peak.
2. Crowds: what 16 ordinary streams get, alone and beside clients that read nothing of long answers, clients
   that never finish their request, and connections on which nothing is ever sent.
"""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx

from benchmarks import record
from pagewire.bench.percentiles import percentile
from pagewire.bench.serve.answer import Answer
from pagewire.bench.serve.datasets import RandomDataset
from pagewire.bench.serve.generator import Generator
from pagewire.bench.serve.load import Load
from pagewire.bench.serve.prompts import PromptMaker
from pagewire.bench.serve.share import Point
from pagewire.bench.serve.target import Target
from pagewire.bench.workloads import Lengths
from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from tools.service import Service

PROTOCOLS = ("http", "grpc")
FACTOR = 50
ROWS, STEP_MS, WAITING = 8, 50, 64
PROMPT, ANSWER = 32, 32
SUSTAINABLE = ROWS * 1000 / STEP_MS / ANSWER
"""Requests a second."""
OPTIONS = ("--engine", "null", "--no-access-log", "--max-model-len", "131072")
OVERLOAD_OPTIONS = (
    *OPTIONS,
    *("--null-step-ms", str(STEP_MS), "--max-num-seqs", str(ROWS), "--max-num-waiting", str(WAITING)),
)
CROWD_OPTIONS = (*OPTIONS, "--null-step-ms", "20", "--stall-timeout", "600", "--request-timeout", "600")
NUM_STREAMS, STREAM_TOKENS = 16, 100
SLOW_READERS, UNFINISHED, IDLE = 20, 1000, 8000
LONG_ANSWER = 100_000
SAMPLE_SECONDS, SETTLE_SECONDS = 1.0, 5.0
_TOKENS = "pagewire:generation_tokens_total"


class Sampler:
    """Looks once a second at what every process holds and how many tokens were generated, in a thread.

    Attributes:
        samples: seconds on the clock `time.monotonic`, tokens so far, MiB by process.
    """

    def __init__(self, service: Service) -> None:
        self.samples: list[tuple[float, float, dict[str, float]]] = []
        self._service = service
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            held = {
                role: process.memory_info().rss / 2**20 for role, process in self._service.processes().items()
            }
            tokens = self._service.metrics()[_TOKENS]
            self.samples.append((time.monotonic(), tokens, held))

    def tokens_per_second(self, begin: float, end: float) -> float:
        """Between two times, as far as samples were taken."""
        inside = [(at, tokens) for at, tokens, _ in self.samples if begin <= at <= end]
        (first_at, first), (last_at, last) = inside[0], inside[-1]
        return (last - first) / (last_at - first_at)

    def memory(self, begin: float) -> dict[str, dict[str, float]]:
        """MiB of each process: at `begin`, half-way, the most since, and at the end."""
        inside = [held for at, _, held in self.samples if at >= begin]
        return {
            role: {
                "first": round(inside[0][role], 1),
                "half_way": round(inside[len(inside) // 2][role], 1),
                "most": round(max(each[role] for each in inside), 1),
                "last": round(inside[-1][role], 1),
            }
            for role in inside[0]
        }


def url(service: Service, protocol: str) -> str:
    """What the load generator is given."""
    return service.http_url if protocol == "http" else f"grpc://{service.grpc_target}"


def measure(service: Service, protocol: str, load: Load, answer: int) -> list[Answer]:
    """Sends requests of PROMPT tokens for `answer` tokens; all have ended when it returns."""
    dataset = RandomDataset(
        maker=PromptMaker(),
        contents=f"{time.time()}",
        input=Lengths(PROMPT, PROMPT),
        output=Lengths(answer, answer),
    )
    with Generator(Target(url=url(service, protocol), timeout=120.0)) as generator:
        generator.use_model(generator.first_model())
        return generator.measure(Point(run="run", load=load, dataset=dataset)).answers


# --- 1. overload


def overload(service: Service, protocol: str, seconds: float) -> dict[str, Any]:
    """The peak, then the overload."""
    with Sampler(service) as sampler:
        began = time.monotonic()
        measure(service, protocol, Load(concurrency=ROWS * 3, duration=seconds / 2), ANSWER)
        peak = sampler.tokens_per_second(began + SETTLE_SECONDS, began + seconds / 2)
        began = time.monotonic()
        used = service.processor_seconds()["frontend"]
        with probing(service) as probes:
            load = Load(rate=SUSTAINABLE * FACTOR, duration=seconds, seed=1)
            answers = measure(service, protocol, load, ANSWER)
        took, used = time.monotonic() - began, service.processor_seconds()["frontend"] - used
        served = sampler.tokens_per_second(began + SETTLE_SECONDS, began + seconds)
        memory = sampler.memory(began + SETTLE_SECONDS)
    complete = [each for each in answers if each.is_complete]
    return {
        "offered_per_second": SUSTAINABLE * FACTOR,
        "sent": len(answers),
        "answered": len(complete),
        "refused": dict(Counter(_kind(each.error) for each in answers if each.error)),
        "without_an_end": sum(not each.is_complete and not each.error for each in answers),
        "ended_seconds_after_the_last_was_sent": round(took - seconds, 1),
        "peak_tokens_per_second": round(peak, 1),
        "overloaded_tokens_per_second": round(served, 1),
        "share_of_peak": round(served / peak, 3),
        "refusal_ms": _spread([(each.ended - each.sent) * 1e3 for each in answers if each.error]),
        "sent_late_ms": _spread([(each.sent - each.due) * 1e3 for each in answers]),
        "frontend_processor_ms_per_request": round(used / len(answers) * 1e3, 2),
        "probes": dict(probes),
        "memory_mib": memory,
    }


def _kind(error: str) -> str:
    return error.split(":")[0] if error.startswith(("HTTP", "gRPC")) else error[:80]


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {"p50": round(percentile(values, 50), 1), "p99": round(percentile(values, 99), 1)}


@contextmanager
def probing(service: Service) -> Iterator[Counter[str]]:
    """Meanwhile looks every half second, through ordinary clients, whether a refusal says when to come again,
    and whether the service says that it lives."""
    found: Counter[str] = Counter()
    stop = threading.Event()

    def probe() -> None:
        with grpc.insecure_channel(service.grpc_target) as channel, httpx.Client(timeout=60) as client:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            while not stop.wait(0.5):
                found[f"/health {client.get(f'{service.http_url}/health').status_code}"] += 1
                asked = {"prompt": "a", "max_tokens": 1}
                refusal = client.post(f"{service.http_url}/v1/completions", json=asked)
                has = "with" if "retry-after" in refusal.headers else "without"
                found[f"HTTP {refusal.status_code} {has} Retry-After"] += 1
                try:
                    stub.GenerateOnce(
                        pb.GenerateRequest(text="a", sampling=pb.SamplingParams(max_tokens=1)), timeout=60
                    )
                    found["gRPC OK"] += 1
                except grpc.RpcError as error:
                    trailing = dict(error.trailing_metadata() or ())
                    has = "with" if "retry-after" in trailing else "without"
                    found[f"gRPC {error.code().name} {has} retry-after"] += 1

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


# --- 2. crowds


@contextmanager
def nobody(service: Service) -> Iterator[int]:
    """No crowd."""
    yield 0


@contextmanager
def slow_readers(service: Service) -> Iterator[int]:
    """Ask for long streams and read nothing of them."""
    body = json.dumps({"prompt": "Once", "max_tokens": LONG_ANSWER, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n"
    with connections(service, SLOW_READERS, head % len(body) + body, receive_buffer=4096) as opened:
        yield opened


@contextmanager
def unfinished(service: Service) -> Iterator[int]:
    """Send the beginning of a request, and then no more."""
    with connections(
        service, UNFINISHED, b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Le"
    ) as opened:
        yield opened


@contextmanager
def idle(service: Service) -> Iterator[int]:
    """Connections on which nothing is sent, half of them to either protocol's port."""
    with connections(service, IDLE, b"") as opened:
        yield opened


@contextmanager
def connections(
    service: Service, count: int, data: bytes, receive_buffer: int | None = None
) -> Iterator[int]:
    """Keeps so many open, on each of which `data` is sent. Yields how many there are. Where there is no data
    every other one goes to gRPC's port."""
    ports = [int(service.http_url.rpartition(":")[2]), int(service.grpc_target.rpartition(":")[2])]
    with ExitStack() as stack:
        for number in range(count):
            client = stack.enter_context(socket.socket())
            if receive_buffer is not None:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            client.settimeout(30)
            client.connect(("127.0.0.1", ports[0] if data else ports[number % 2]))
            if data:
                client.sendall(data)
        yield count


CROWDS: dict[str, Callable[[Service], Any]] = {
    "slow_readers": slow_readers,
    "unfinished_requests": unfinished,
    "idle_connections": idle,
}


def crowd(service: Service, name: str, seconds: float) -> dict[str, Any]:
    """What ordinary streams get without and with a crowd, in turns, and what the processes hold."""
    rates: dict[str, list[float]] = {"alone": [], "beside": []}
    errors: Counter[str] = Counter()
    used: dict[str, list[float]] = {"alone": [], "beside": []}
    count, memory = 0, {}
    for case, around in (
        ("alone", nobody),
        ("beside", CROWDS[name]),
        ("alone", nobody),
        ("beside", CROWDS[name]),
    ):
        with around(service) as opened:
            count = max(count, opened)
            before = service.processor_seconds()["frontend"]
            began = time.monotonic()
            answers = measure(service, "http", Load(concurrency=NUM_STREAMS, duration=seconds), STREAM_TOKENS)
            took = time.monotonic() - began
            used[case].append(service.processor_seconds()["frontend"] - before)
            rates[case].append(sum(each.num_outputs for each in answers if each.is_complete) / took)
            errors.update(_kind(each.error) for each in answers if each.error)
            if case == "beside":
                memory = {
                    role: round(p.memory_info().rss / 2**20, 1) for role, p in service.processes().items()
                }
    alone, beside = (sum(rates[case]) / len(rates[case]) for case in ("alone", "beside"))
    return {
        "connections": count,
        "tokens_per_second_alone": [round(each, 1) for each in rates["alone"]],
        "tokens_per_second_beside": [round(each, 1) for each in rates["beside"]],
        "share": round(beside / alone, 3),
        "frontend_processor_seconds": {case: [round(s, 2) for s in each] for case, each in used.items()},
        "failed": dict(errors),
        "memory_mib": memory,
    }


@contextmanager
def running(options: Sequence[str]) -> Iterator[Service]:
    """A service for one case."""
    with tempfile.TemporaryDirectory() as name, Service(Path(name), options=tuple(options)) as service:
        yield service


def main() -> None:
    """Measures and reports."""
    parser = record.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument(
        "--crowd-seconds", type=float, default=15.0, help="of each measurement beside a crowd"
    )
    parser.add_argument("--cases", default=",".join((*PROTOCOLS, *CROWDS)))
    arguments: argparse.Namespace = parser.parse_args()
    results: dict[str, Any] = {}
    for case in arguments.cases.split(","):
        with running(OVERLOAD_OPTIONS if case in PROTOCOLS else CROWD_OPTIONS) as service:
            results[case] = (
                overload(service, case, arguments.seconds)
                if case in PROTOCOLS
                else crowd(service, case, arguments.crowd_seconds)
            )
        print(case, json.dumps(results[case], indent=2), flush=True)
    record.write(arguments.json, results)


if __name__ == "__main__":
    main()
