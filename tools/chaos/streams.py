"""Clients that never rest, over both protocols, and what became of their requests."""

from __future__ import annotations

import asyncio
import json
import random
import time
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import grpc

from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from tools.service import Service

PROTOCOLS = ("grpc", "http")
ANSWER_SECONDS = 120.0
AGAIN_SECONDS = 0.25
# A connection that breaks so long after a frontend was killed broke because of that.
BREAK_SECONDS = 2.0
# As gRPC's client words it when a connection, and not a server, ends a call.
_TRANSPORT_ERRORS = (
    "Socket closed",
    "recvmsg",
    "onnection reset",
    "roken pipe",
    "GOAWAY",
)
_CHANNEL_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
# A failure's description is cut here, so that a record of many stays readable.
MOST_CHARACTERS = 300


class ConnectionLost(Exception):
    """The connection broke."""


class NobodyListens(ConnectionLost):
    """The connection was refused, so that the request reached nobody."""


class RequestFailed(Exception):
    """The server refused the request or ended it with an error."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request whose answer never changes: greedy without a seed, drawn with one.

    Attributes:
        ids: the prompt.
        max_tokens: as many as it gets.
    """

    ids: tuple[int, ...]
    max_tokens: int
    seed: int | None


def draw_asks(count: int, longest: int, seed: int, *, greedy: bool = True) -> list[Ask]:
    """Requests of many lengths, half of them greedy, with up to `longest` tokens to generate."""
    generator = random.Random(seed)
    return [
        Ask(
            ids=tuple(generator.randrange(300, 4000) for _ in range(generator.randrange(4, 48))),
            max_tokens=generator.randrange(longest // 2, longest + 1),
            seed=None if greedy and number % 2 else generator.randrange(1 << 31),
        )
        for number in range(count)
    ]


@dataclass(slots=True)
class Outcomes:
    """How requests ended. Empty `failures` and `differences` are what is hoped for.

    Attributes:
        answered: requests that got all their tokens, by protocol.
        tokens: how many those were.
        broken: attempts whose frontend was killed; they were made again.
        unreachable: attempts that found no frontend to connect to; they were made again.
        failures: of other kinds, counted by what was said.
        differences: answers with other tokens than expected, in words.
    """

    answered: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    broken: Counter[str] = field(default_factory=Counter)
    unreachable: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)


class Streams:
    """Keeps `count` streams open, each over a connection of its own, half of them over each protocol.

    Args:
        expected: what each request is answered with.
        frontend_killed_at: when a frontend was last killed (`time.monotonic`).

    Attributes:
        arrivals: when each stream gained tokens (`time.monotonic`).
        num_received: tokens that the request under way on each stream has got.
    """

    def __init__(
        self,
        service: Service,
        expected: dict[Ask, list[int]],
        count: int,
        *,
        frontend_killed_at: Callable[[], float],
        seed: int = 0,
    ) -> None:
        self.outcomes = Outcomes()
        self.arrivals = [array("d") for _ in range(count)]
        self.num_received = [0] * count
        self._service = service
        self._expected = expected
        self._asks = list(expected)
        self._frontend_killed_at = frontend_killed_at
        self._random = random.Random(seed)
        self._stopping = False

    async def run(self) -> None:
        """Until `stop` was called and the requests under way have ended."""
        async with new_session() as session:
            await asyncio.gather(
                *(self._keep_asking(number, session) for number in range(len(self.arrivals)))
            )

    def stop(self) -> None:
        """No request follows those that are under way."""
        self._stopping = True

    async def _keep_asking(self, number: int, session: aiohttp.ClientSession) -> None:
        protocol = PROTOCOLS[number % len(PROTOCOLS)]
        ask = self._random.choice(self._asks)
        while not self._stopping:
            if await self._attempt(number, ask, protocol, session):
                ask = self._random.choice(self._asks)
            else:
                await asyncio.sleep(AGAIN_SECONDS)

    async def _attempt(self, number: int, ask: Ask, protocol: str, session: aiohttp.ClientSession) -> bool:
        """Asks once; False if it has to be done again because of a killed frontend."""
        received: list[int] = []
        began = time.monotonic()
        try:
            async with (
                asyncio.timeout(ANSWER_SECONDS),
                aclosing(answer(self._service, ask, protocol, session)) as parts,
            ):
                async for ids in parts:
                    received += ids
                    self.arrivals[number].append(time.monotonic())
                    self.num_received[number] = len(received)
        except ConnectionLost as error:
            return self._lost(ask, received, protocol, began, error)
        except (RequestFailed, TimeoutError) as error:
            what = str(error) or f"no end within {ANSWER_SECONDS:g} s"
            self._failed(f"{protocol}: {what}")
            await asyncio.sleep(AGAIN_SECONDS)
            return True
        finally:
            self.num_received[number] = 0
        self.outcomes.answered[protocol] += 1
        self.outcomes.tokens += len(received)
        self._compare(ask, received, self._expected[ask], protocol)
        return True

    def _lost(
        self, ask: Ask, received: list[int], protocol: str, began: float, error: ConnectionLost
    ) -> bool:
        """Takes notice of a broken connection; False if its frontend was killed."""
        self._compare(ask, received, self._expected[ask][: len(received)], protocol)
        now, killed_at = time.monotonic(), self._frontend_killed_at()
        if isinstance(error, NobodyListens):
            self.outcomes.unreachable += 1
            return False
        if killed_at >= began - BREAK_SECONDS and now - killed_at <= BREAK_SECONDS:
            self.outcomes.broken[protocol] += 1
            return False
        self._failed(f"{protocol}: connection lost though no frontend was killed: {error}")
        return True

    def _failed(self, what: str) -> None:
        self.outcomes.failures[what[:MOST_CHARACTERS]] += 1

    def _compare(self, ask: Ask, received: list[int], wanted: Sequence[int], protocol: str) -> None:
        if received != list(wanted):
            kind = "greedy" if ask.seed is None else "seeded"
            self.outcomes.differences.append(f"{protocol}, {kind}: {difference(received, wanted)}")


def difference(received: Sequence[int], wanted: Sequence[int]) -> str:
    """Where two answers part, in words."""
    same = next(
        (at for at, (ours, theirs) in enumerate(zip(received, wanted, strict=False)) if ours != theirs),
        min(len(received), len(wanted)),
    )
    return (
        f"{len(received)} tokens instead of {len(wanted)}, the same up to {same}: then "
        f"{list(received[same : same + 4])} instead of {list(wanted[same : same + 4])}"
    )


async def undisturbed(service: Service, asks: Sequence[Ask], concurrency: int) -> dict[Ask, list[int]]:
    """What every request is answered with when nothing happens; it is asked over one protocol or the other.

    Raises:
        RequestFailed, ConnectionLost: one is not answered.
    """
    slots = asyncio.Semaphore(concurrency)

    async def complete(number: int, ask: Ask) -> list[int]:
        async with slots, aclosing(answer(service, ask, PROTOCOLS[number % 2], session)) as parts:
            return [token async for ids in parts for token in ids]

    async with new_session() as session:
        answers = await asyncio.gather(*(complete(*each) for each in enumerate(asks)))
    return dict(zip(asks, answers, strict=True))


def new_session() -> aiohttp.ClientSession:
    """An HTTP client that makes a connection for each request, so that every frontend gets some."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))


def answer(
    service: Service, ask: Ask, protocol: str, session: aiohttp.ClientSession
) -> AsyncIterator[Sequence[int]]:
    """The tokens of one answer, as they come.

    Raises:
        ConnectionLost: the connection broke before the end.
        RequestFailed: the server said so.
    """
    return _over_grpc(service, ask) if protocol == "grpc" else _over_http(service, ask, session)


def _sampling(ask: Ask) -> dict[str, Any]:
    """Under the names that both protocols have. A greedy text without a penalty soon repeats itself, and then
    a token that is lost looks like the one after it."""
    how: dict[str, Any] = {"max_tokens": ask.max_tokens, "ignore_eos": True}
    if ask.seed is None:
        return {**how, "temperature": 0, "repetition_penalty": 2.0}
    return {**how, "temperature": 0.9, "top_k": 50, "seed": ask.seed}


async def _over_grpc(service: Service, ask: Ask) -> AsyncIterator[Sequence[int]]:
    sampling = pb.SamplingParams(**_sampling(ask))
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=ask.ids), sampling=sampling)
    finished = None
    async with grpc.aio.insecure_channel(service.grpc_target, options=_CHANNEL_OPTIONS) as channel:
        try:
            async for event in inference_pb2_grpc.InferenceServiceStub(channel).Generate(request):
                if event.HasField("delta"):
                    yield event.delta.token_ids
                elif event.HasField("finished"):
                    finished = event.finished.finish_reason
        except grpc.aio.AioRpcError as error:
            raise _grpc_failure(error) from error
    if finished != pb.FINISH_REASON_LENGTH:
        raise RequestFailed(f"ended with {finished}")


def _grpc_failure(error: grpc.aio.AioRpcError) -> Exception:
    """The status UNAVAILABLE is the server's word in some calls, and the library's in others."""
    said = f"{error.code().name}: {error.details()}"
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        if "failed to connect" in said:
            return NobodyListens(said)
        if any(each in said for each in _TRANSPORT_ERRORS):
            return ConnectionLost(said)
    return RequestFailed(said)


async def _over_http(
    service: Service, ask: Ask, session: aiohttp.ClientSession
) -> AsyncIterator[Sequence[int]]:
    body = {
        "prompt": list(ask.ids),
        "stream": True,
        "return_token_ids": True,  # nosec B105 # no password
        **_sampling(ask),
    }
    finished, last = None, b""
    try:
        async with session.post(f"{service.http_url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise RequestFailed(f"HTTP {response.status}: {await response.text()}")
            async for line in response.content:
                if not line.strip():
                    continue
                last = line
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise RequestFailed(f"event of error: {event['error']}")
                    for choice in event["choices"]:
                        finished = choice["finish_reason"] or finished
                        if choice.get("token_ids"):
                            yield choice["token_ids"]
    except aiohttp.ClientConnectorError as error:
        raise NobodyListens(str(error)) from error
    except (aiohttp.ClientError, OSError) as error:
        raise ConnectionLost(f"{type(error).__name__}: {error}") from error
    if finished != "length" or last.strip() != b"data: [DONE]":
        raise RequestFailed(f"ended with {finished} and {last!r}")
