"""Publishes what happens in the prefix cache over ZMQ, in vLLM's schema, for routers outside.

Messages of the PUB socket are [topic, sequence number, batch]. A batch is msgpack of [time, events,
data_parallel_rank], and an event ["BlockStored", block_hashes, parent_block_hash, token_ids, block_size,
lora_id, medium, lora_name], ["BlockRemoved", block_hashes, medium] or ["AllBlocksCleared"]; with the encoding
"map" both are objects with these names, and the event's is `type`. Who sends a sequence number to the replay
socket gets [number, batch] from there on, then [-1, nothing]. Sequence numbers have 8 bytes, big-endian.

The scheduler's event loop only collects; a thread packs and sends.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from engine.dispatch.facts import WorkerFacts
from pagewire.base.errors import ConfigError
from pagewire.wire.block_hashes import BlockHash
from scheduler.kv_events_config import PARAM, KvEventsConfig, of_rank
from scheduler.request import Request

logger = logging.getLogger(__name__)

_WAIT_SECONDS = 0.05
_CLOSE_SECONDS = 1.0
_END = (-1).to_bytes(8, "big", signed=True)


@dataclass(slots=True)
class Stored:
    """Consecutive blocks of one request that can be found from now on."""

    hashes: list[BlockHash]
    parent: BlockHash | None
    token_ids: list[int]
    adapter_id: int
    block_size: int
    medium: str

    def fields(self) -> dict[str, Any]:
        """By name, in the order of the schema."""
        adapter = self.adapter_id or None
        return {
            "type": "BlockStored",
            "block_hashes": self.hashes,
            "parent_block_hash": self.parent,
            "token_ids": self.token_ids,
            "block_size": self.block_size,
            "lora_id": adapter,
            "medium": self.medium,
            "lora_name": None if adapter is None else str(adapter),
        }


@dataclass(slots=True)
class Removed:
    """Blocks that cannot be found any more."""

    medium: str
    hashes: list[BlockHash] = field(default_factory=list)

    def fields(self) -> dict[str, Any]:
        """By name, in the order of the schema."""
        return {"type": "BlockRemoved", "block_hashes": self.hashes, "medium": self.medium}


@dataclass(slots=True)
class Cleared:
    """No block can be found any more."""

    def fields(self) -> dict[str, Any]:
        """By name, in the order of the schema."""
        return {"type": "AllBlocksCleared"}


class KvEventCollector:
    """Collects events in their order until they are flushed. A `CacheWatcher`.

    Args:
        facts: returns the attached worker's facts.
        publish: takes a batch of events and their time.
    """

    def __init__(
        self,
        facts: Callable[[], WorkerFacts | None],
        publish: Callable[[float, list[Stored | Removed | Cleared]], None],
    ) -> None:
        self._facts, self._publish = facts, publish
        self._events: list[Stored | Removed | Cleared] = []
        self._last: tuple[Request, int] | None = None

    def stored(self, request: Request, index: int) -> None:
        """See `CacheWatcher`."""
        facts = self._facts()
        assert facts is not None
        size, block_hash = facts.limits.block_size, request.block_hashes[index]
        token_ids = request.token_ids[index * size : (index + 1) * size].tolist()
        last = self._events[-1] if self._events else None
        if isinstance(last, Stored) and self._last == (request, index - 1):
            last.hashes.append(block_hash)
            last.token_ids += token_ids
        else:
            # The root of a salt or an adapter is no block that anybody could know.
            parent = request.block_hashes[index - 1] if index else None
            stored = Stored([block_hash], parent, token_ids, request.adapter_id, size, self._medium())
            self._events.append(stored)
        self._last = request, index

    def removed(self, block_hash: BlockHash) -> None:
        """See `CacheWatcher`."""
        last = self._events[-1] if self._events else None
        if not isinstance(last, Removed):
            last = Removed(self._medium())
            self._events.append(last)
        last.hashes.append(block_hash)

    def cleared(self) -> None:
        """See `CacheWatcher`."""
        self._events.append(Cleared())

    def flush(self) -> None:
        """See `CacheWatcher`."""
        if self._events:
            self._publish(time.time(), self._events)
            self._events, self._last = [], None

    def _medium(self) -> str:
        facts = self._facts()
        return "GPU" if facts is not None and facts.device.startswith("cuda") else "CPU"


class KvEventPublisher:
    """Owns the sockets and the thread that uses them.

    Args:
        rank: the replica's number.

    Raises:
        ConfigError: an address cannot be bound.
    """

    def __init__(self, config: KvEventsConfig, rank: int) -> None:
        import zmq

        self._config, self._rank = config, rank
        self._queue: queue.Queue[tuple[int, float, list[Any]] | None] = queue.Queue(config.max_queue_size)
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=config.buffer_steps)
        self._next = 0
        self._num_dropped = 0
        self._context = zmq.Context()
        self._pub = self._context.socket(zmq.PUB)
        self._pub.set_hwm(config.hwm)
        self._replay = None
        endpoint = of_rank(config.endpoint, rank)
        try:
            if "*" in endpoint or "::" in endpoint or not endpoint.startswith("tcp://"):
                self._pub.bind(endpoint)
            else:
                self._pub.connect(endpoint)
            if config.replay_endpoint is not None:
                endpoint = of_rank(config.replay_endpoint, rank)
                self._replay = self._context.socket(zmq.ROUTER)
                self._replay.bind(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"{PARAM}: cannot use {endpoint}: {error}", param=PARAM) from error
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def publish(self, now: float, events: list[Stored | Removed | Cleared]) -> None:
        """Queues a batch. One that finds the queue full is dropped; subscribers see it by its number."""
        number, self._next = self._next, self._next + 1
        try:
            self._queue.put_nowait((number, now, events))
        except queue.Full:
            if not self._num_dropped:
                logger.warning("KV events come faster than they are published; batches are dropped")
            self._num_dropped += 1

    def close(self) -> None:
        """Publishes what is queued, for a second at most, and closes the sockets."""
        try:
            self._queue.put(None, timeout=_CLOSE_SECONDS)
        except queue.Full:
            logger.warning("KV events were not published to the end")
        self._thread.join(_CLOSE_SECONDS)
        self._context.destroy(linger=0)

    def _run(self) -> None:
        while True:
            if self._replay is not None and self._replay.poll(0):
                self._send_again()
            try:
                batch = self._queue.get(timeout=_WAIT_SECONDS)
            except queue.Empty:
                continue
            if batch is None:
                return
            number, now, events = batch
            key, payload = number.to_bytes(8, "big"), self._packed(now, events)
            self._kept.append((key, payload))
            self._pub.send_multipart((self._config.topic.encode(), key, payload))

    def _packed(self, now: float, events: list[Any]) -> bytes:
        import msgpack

        fields = [event.fields() for event in events]
        if self._config.encoding == "map":
            batch: Any = {"ts": now, "events": fields, "data_parallel_rank": self._rank}
        else:
            batch = [now, [list(each.values()) for each in fields], self._rank]
        packed: bytes = msgpack.packb(batch, use_bin_type=True)
        return packed

    def _send_again(self) -> None:
        assert self._replay is not None
        frames = self._replay.recv_multipart()
        if len(frames) != 3 or len(frames[2]) != 8:
            logger.warning("a request for KV events is not [empty, 8 bytes]: %s", frames[1:])
            return
        client, _, start = frames
        for key, payload in self._kept:
            if key >= start:
                self._replay.send_multipart((client, b"", key, payload))
        self._replay.send_multipart((client, b"", _END, b""))
