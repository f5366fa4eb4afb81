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

import grpc
import httpx

from benchmarks import record
from pagewire.bench.picture import Axis, Panel, Series, draw
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
MOST_POINTS = 120
"""Of each line in the record and the picture."""


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


def summary(samples: list[Any]) -> dict[str, Any]:
    """What a record keeps of the samples: figures, and series with as many points as a picture needs."""
    rests = [each for each in samples if each.get("at_rest")]
    roles = [role for role, value in rests[-1].items() if isinstance(value, dict)]
    return {
        "rests": len(rests),
        "most_blocks_in_use_at_rest": max(each["used_blocks"] for each in rests),
        "memory_mib": {
            role: {f"{part}_sixth": round(_middle(samples, role, part), 1) for part in ("second", "last")}
            for role in roles
        },
        "descriptors_at_rest": {
            role: {"least": min(held), "most": max(held)}
            for role in roles
            if (held := [each[role]["fds"] for each in rests if role in each])
        },
        "series": series(samples, roles),
    }


def series(samples: list[Any], roles: list[str]) -> dict[str, list[float | None]]:
    """Memory of each process and blocks in use over time, in columns of at most MOST_POINTS: each point is
    the most that was held since the one before it; None where a process did not run."""
    size = -(-len(samples) // MOST_POINTS)
    parts = [samples[begin : begin + size] for begin in range(0, len(samples), size)]
    memory: dict[str, list[float | None]] = {
        f"{role}, MiB": [
            max((each[role]["rss_mib"] for each in part if role in each), default=None) for part in parts
        ]
        for role in roles
    }
    return {
        "s": [part[-1]["s"] for part in parts],
        **memory,
        "KV blocks in use": [max(each["used_blocks"] for each in part) for part in parts],
    }


def picture(columns: dict[str, list[float | None]]) -> str:
    """Of `series`, as SVG."""
    times, *lines = columns.items()
    minutes = [(at or 0.0) / 60 for at in times[1]]
    drawn = [
        Series(name, [(at, value) for at, value in zip(minutes, values, strict=True) if value is not None])
        for name, values in lines
    ]
    across, up = Axis(0.0, max(minutes)), Axis.from_zero([y for line in drawn for _, y in line.points])
    return draw("What the processes hold", [Panel("", "minutes", across, up, drawn, width=830)])


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
    results = {
        "hours": arguments.hours,
        "rate": arguments.rate,
        "ends": dict(ends),
        "faults": found,
        **summary(samples),
    }
    if arguments.picture is not None:
        arguments.picture.write_text(picture(results["series"]), encoding="utf-8")
    if arguments.json is not None:
        write_record(arguments.json, {**describe_run("soak", "python -m tools.soak"), "results": results})
    print(f"{sum(ends.values())} requests; " + ("; ".join(found) or "everything stayed flat"))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
