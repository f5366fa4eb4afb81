"""Keeps a service busy for hours with requests of every kind, and watches what it holds on to.

python -m tools.soak --hours 2 --rate 4 --json benchmarks/results/soak.json --picture soak.svg

The real processes over a tiny model of random weights (see fuzz_service.py). Every ten seconds it notes each
process's memory, descriptors and threads, and the KV blocks in use; every ten minutes it lets the service
come to rest, when no block may be in use. At the end, what the processes hold is compared with what they held
once everything had been used: status 1 if memory has grown by more than a tenth, if descriptors or blocks are
left, if a process was restarted, or if a request got no proper end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape  # nosec B406 # writes, parses nothing

import grpc
import httpx

from benchmarks import record
from pagewire.bench.record import describe_run, write_record
from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from tools.chaos.remains import FEW_DESCRIPTORS
from tools.fuzz_service import harm, process_ids, start_service
from tools.service import Service

SAMPLE_SECONDS, REST_SECONDS, SETTLE_SECONDS = 10.0, 600.0, 8.0
MOST_OPEN = 64
GROWTH = 1.1
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer", "minimum": 0}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
PREFIX = "The same beginning for many requests. " * 20
COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#8d6a9f", "#c78a1e")


class Load:
    """Requests of every kind, one at a time by chance, and how each ended."""

    def __init__(self, service: Service, seed: int) -> None:
        self._random = random.Random(seed)
        self._http = httpx.AsyncClient(base_url=service.http_url, timeout=120)
        self._channel = grpc.aio.insecure_channel(service.grpc_target)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self.ends: Counter[str] = Counter()
        self._kinds: tuple[Callable[[], Awaitable[None]], ...] = (
            self.chat_stream,
            self.several,
            self.dropped_stream,
            self.constrained,
            self.refused,
            self.embedding,
            self.shared_prefix,
            self.grpc_stream,
            self.grpc_dropped,
            self.logprobs,
        )

    async def one(self) -> None:
        """A request of some kind. What it raises is counted as its end."""
        kind = self._random.choice(self._kinds)
        try:
            await kind()
            self.ends[f"{kind.__name__}: as expected"] += 1
        except Exception as error:
            self.ends[f"{kind.__name__}: {type(error).__name__} {error}"[:200]] += 1

    async def close(self) -> None:
        await self._http.aclose()
        await self._channel.close()

    async def _post(self, path: str, status: int = 200, **body: Any) -> Any:
        answer = await self._http.post(path, json=body)
        if answer.status_code != status:
            raise RuntimeError(f"{answer.status_code} {answer.text[:100]}")
        return answer.json()

    def _chat(self) -> dict[str, Any]:
        text = f"Number {self._random.random()}: " + "word " * self._random.randrange(1, 60)
        return {"messages": [{"role": "user", "content": text}], "max_tokens": self._random.randrange(1, 48)}

    async def chat_stream(self) -> None:
        last = ""
        async with self._http.stream(
            "POST", "/v1/chat/completions", json={**self._chat(), "stream": True}
        ) as answer:
            async for line in answer.aiter_lines():
                last = line or last
        if last != "data: [DONE]":
            raise RuntimeError(f"ended with {last[:60]}")

    async def several(self) -> None:
        await self._post("/v1/completions", prompt=["one", "two"], n=2, max_tokens=16, temperature=1.5)

    async def dropped_stream(self) -> None:
        body = {**self._chat(), "stream": True, "max_tokens": 400, "ignore_eos": True}
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                if self._random.random() < 0.2:
                    return

    async def constrained(self) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
        body = {**self._chat(), "max_tokens": 200, "response_format": form}
        answer = await self._post("/v1/chat/completions", **body)
        if answer["choices"][0]["finish_reason"] == "stop":
            json.loads(answer["choices"][0]["message"]["content"])

    async def refused(self) -> None:
        await self._post("/v1/completions", status=400, prompt="x", max_tokens=4, temperature=-1)

    async def embedding(self) -> None:
        await self._post("/v1/embeddings", input=["a", "b c"], pooling="mean")

    async def shared_prefix(self) -> None:
        await self._post("/v1/completions", prompt=PREFIX + str(self._random.random()), max_tokens=8)

    async def logprobs(self) -> None:
        await self._post("/v1/completions", prompt="a b c", max_tokens=8, logprobs=5, echo=True)

    async def _grpc(self, drop: bool) -> None:
        sampling = pb.SamplingParams(temperature=1, max_tokens=400 if drop else 20, ignore_eos=drop)
        call = self._stub.Generate(pb.GenerateRequest(text="over gRPC", sampling=sampling), timeout=120)
        finished = False
        async for event in call:
            finished = event.HasField("finished")
            if drop and self._random.random() < 0.2:
                call.cancel()
                return
        if not finished:
            raise RuntimeError("no terminal message")

    async def grpc_stream(self) -> None:
        await self._grpc(drop=False)

    async def grpc_dropped(self) -> None:
        await self._grpc(drop=True)


def sample(service: Service, began: float) -> dict[str, Any]:
    """What every process holds now."""
    held: dict[str, Any] = {"s": round(time.monotonic() - began, 1)}
    for role, process in service.processes().items():
        held[role] = {
            "rss_mib": round(process.memory_info().rss / 2**20, 1),
            "fds": process.num_fds(),
            "threads": process.num_threads(),
        }
    held["used_blocks"] = service.metrics().get("pagewire:kv_cache_used_blocks", 0.0)
    return held


async def at_rest(service: Service, began: float) -> dict[str, Any]:
    """A sample after everything has ended."""
    await asyncio.sleep(SETTLE_SECONDS)
    return {**sample(service, began), "at_rest": True}


async def soak(service: Service, seconds: float, rate: float, seed: int) -> tuple[list[Any], Counter[str]]:
    """The samples, and how requests ended."""
    load, began = Load(service, seed), time.monotonic()
    generator, samples = random.Random(seed + 1), []
    open_requests: set[asyncio.Task[None]] = set()
    next_sample, next_rest = began + SAMPLE_SECONDS, began + min(REST_SECONDS, seconds / 6)
    while time.monotonic() < began + seconds:
        await asyncio.sleep(generator.expovariate(rate))
        if len(open_requests) < MOST_OPEN:
            task = asyncio.create_task(load.one())
            open_requests.add(task)
            task.add_done_callback(open_requests.discard)
        now = time.monotonic()
        if now >= next_rest:
            await asyncio.gather(*open_requests)
            samples.append(await at_rest(service, began))
            next_rest += min(REST_SECONDS, seconds / 6)
        elif now >= next_sample:
            samples.append(sample(service, began))
            next_sample = now + SAMPLE_SECONDS
    await asyncio.gather(*open_requests)
    samples.append(await at_rest(service, began))
    await load.close()
    return samples, load.ends


def faults(samples: list[Any], ends: Counter[str]) -> list[str]:
    """What was not flat, and what did not end as it should."""
    found = [f"{count} x {end}" for end, count in ends.items() if not end.endswith(": as expected")]
    rests = [each for each in samples if each.get("at_rest")]
    found += [
        f"{each['used_blocks']:.0f} blocks in use at {each['s']} s" for each in rests if each["used_blocks"]
    ]
    first, last = rests[1] if len(rests) > 2 else rests[0], rests[-1]
    for role in (key for key, value in first.items() if isinstance(value, dict)):
        if role not in last:
            found.append(f"{role} is gone")
            continue
        if last[role]["fds"] > first[role]["fds"] + FEW_DESCRIPTORS:
            found.append(f"{role}: {first[role]['fds']} descriptors became {last[role]['fds']}")
        before, after = (_middle(samples, role, part) for part in ("second", "last"))
        if after > before * GROWTH:
            found.append(f"{role}: {before:.0f} MiB became {after:.0f}")
    return found


def _middle(samples: list[Any], role: str, part: str) -> float:
    """The median memory of a process in the second or the last sixth of the time."""
    size = max(1, len(samples) // 6)
    chosen = samples[size : 2 * size] or samples if part == "second" else samples[-size:]
    return statistics.median(each[role]["rss_mib"] for each in chosen if role in each)


def picture(samples: list[Any]) -> str:
    """Memory of each process and blocks in use over time, as SVG."""
    roles = [key for key, value in samples[0].items() if isinstance(value, dict)]
    lines = {
        f"{role}, MiB": [(each["s"], each[role]["rss_mib"]) for each in samples if role in each]
        for role in roles
    }
    lines["KV blocks in use"] = [(each["s"], each["used_blocks"]) for each in samples]
    width, height, left, top = 900, 380, 70, 20
    most_x = max(each["s"] for each in samples) or 1.0
    most_y = max(value for points in lines.values() for _, value in points) * 1.05 or 1.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 240} {height + 70}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for share in range(5):
        y = top + height - share * height / 4
        parts.append(f'<path d="M{left} {y}h{width - left}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{share * most_y / 4:.0f}</text>')
        x = left + share * (width - left) / 4
        parts.append(
            f'<text x="{x}" y="{top + height + 20}" text-anchor="middle">'
            f"{share * most_x / 240:.0f} min</text>"
        )
    for number, (name, points) in enumerate(lines.items()):
        places = " ".join(
            f"{left + x / most_x * (width - left):.1f},{top + height - y / most_y * height:.1f}"
            for x, y in points
        )
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}"/>')
        parts.append(
            f'<text x="{width + 12}" y="{top + 20 + number * 20}" fill="{colour}">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def main() -> int:
    """The exit status: 0 if everything stayed flat."""
    parser = record.parser(__doc__)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--picture", type=Path)
    arguments: argparse.Namespace = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        service = start_service(Path(name), "--max-model-len", "1024")
        try:
            before = process_ids(service)
            samples, ends = asyncio.run(soak(service, arguments.hours * 3600, arguments.rate, arguments.seed))
            found = faults(samples, ends) + harm(service, before)
        finally:
            service.stop()
    if arguments.picture is not None:
        arguments.picture.write_text(picture(samples), encoding="utf-8")
    results = {
        "hours": arguments.hours,
        "rate": arguments.rate,
        "ends": dict(ends),
        "faults": found,
        "samples": samples,
    }
    if arguments.json is not None:
        write_record(arguments.json, {**describe_run("soak", "python -m tools.soak"), "results": results})
    print(f"{sum(ends.values())} requests; " + ("; ".join(found) or "everything stayed flat"))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
