"""KV events over ZMQ as a subscriber of vLLM's schema reads them, and gaps that a replay fills."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from engine.dispatch.facts import WorkerFacts
from engine.dispatch.limits import EngineLimits
from engine.dispatch.sampling import SamplingRecord
from pagewire.base.errors import ConfigError
from pagewire.wire.block_hashes import root_hash
from scheduler.config import SchedulerConfig
from scheduler.core import Scheduler
from scheduler.kv_events_config import KvEventsConfig, of_rank
from scheduler.request import Request
from scheduler.serve.cache_feed import CacheFeed
from scheduler.serve.kv_events import KvEventCollector, KvEventPublisher
from tests.unit.scheduler.executor import MiniatureWorker

BLOCK = 2
LIMITS = EngineLimits(
    vocab_size=50, max_model_len=16, block_size=BLOCK, num_blocks=8, max_num_seqs=2, max_num_batched_tokens=16
)
FACTS = WorkerFacts("m", LIMITS, (), "float32", "cpu")


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


class Cache:
    """A core whose cache events are collected."""

    def __init__(self) -> None:
        self.batches: list[list[dict[str, Any]]] = []
        self.feed = CacheFeed(lambda: None)
        self.feed.touch = lambda: None  # type: ignore[method-assign]
        self.collector = KvEventCollector(
            lambda: FACTS, lambda _, events: self.batches.append([each.fields() for each in events])
        )
        self.feed.add_watcher(self.collector)
        self.core = Scheduler(LIMITS)
        self.worker = MiniatureWorker(BLOCK, 50, 8, 2)
        self.feed.attach(self.core)

    def run(self, token_ids: list[int], **fields: Any) -> list[dict[str, Any]]:
        """Computes a prompt and one token; the events of that."""
        request = Request(
            "r",
            array("I", token_ids),
            len(token_ids),
            SamplingRecord(),
            max_total_tokens=len(token_ids) + 1,
            **fields,
        )
        self.core.add(request)
        while (plan := self.core.schedule()) is not None:
            self.core.update(self.worker.execute(plan))
        self.collector.flush()
        return self.batches.pop()


def test_stored_blocks_come_with_their_tokens_parents_and_hashes() -> None:
    cache = Cache()
    (cleared, stored) = cache.run([1, 2, 3, 4, 5])
    assert cleared == {"type": "AllBlocksCleared"}
    assert stored["token_ids"] == [1, 2, 3, 4]
    assert stored["parent_block_hash"] is None
    assert (stored["block_size"], stored["medium"], stored["lora_id"]) == (BLOCK, "CPU", None)
    first, second = stored["block_hashes"]
    (more,) = cache.run([1, 2, 3, 4, 5, 6, 7])
    assert more["parent_block_hash"] == second
    assert more["token_ids"] == [5, 6]
    (salted,) = cache.run([1, 2, 9], root_hash=root_hash("salt"))
    assert salted["block_hashes"] != [first]


def test_what_is_told_is_what_is_cached() -> None:
    """A subscriber that follows the events knows the pool's content, evictions included."""
    cache, known = Cache(), set()
    for number in range(20):
        for event in cache.run([number % 7 + shift for shift in range(5 + number % 4)]):
            if event["type"] == "BlockStored":
                known.update(event["block_hashes"])
            elif event["type"] == "BlockRemoved":
                assert known.issuperset(event["block_hashes"])
                known.difference_update(event["block_hashes"])
            else:
                known.clear()
        assert known == set(cache.core.pool.cached_hashes())
    assert cache.core.pool.num_evictions > 0


@pytest.mark.parametrize("encoding", ["array", "map"])
def test_subscribers_get_batches_and_replay_those_they_missed(
    tmp_path: Path, context: zmq.Context[zmq.Socket[bytes]], encoding: str
) -> None:
    endpoint, replay_endpoint = f"ipc://{tmp_path}/pub", f"ipc://{tmp_path}/replay"
    config = KvEventsConfig(
        enable_kv_cache_events=True,
        endpoint=endpoint,
        replay_endpoint=replay_endpoint,
        topic="kv",
        buffer_steps=3,
        encoding=encoding,
    )
    cache = Cache()
    with closing(KvEventPublisher(config, rank=1)) as publisher:
        cache.collector._publish = publisher.publish
        subscriber = context.socket(zmq.SUB)
        subscriber.connect(of_rank(endpoint, 1))
        subscriber.setsockopt(zmq.SUBSCRIBE, b"kv")
        subscriber.setsockopt(zmq.RCVTIMEO, 5000)
        number = 0
        while not subscriber.poll(50):  # until the subscription has arrived
            publisher.publish(0.0, [])
            number += 1
        while subscriber.poll(200):
            topic, key, payload = subscriber.recv_multipart()
        cache.batches.append([])
        cache.run([1, 2, 3])
        topic, key, payload = subscriber.recv_multipart()
        assert topic == b"kv"
        assert int.from_bytes(key, "big") == number
        batch = msgpack.unpackb(payload)
        if encoding == "array":
            at, events, rank = batch
            assert [event[0] for event in events] == ["AllBlocksCleared", "BlockStored"]
            assert events[1][3:6] == [[1, 2], BLOCK, None]
        else:
            at, events, rank = batch["ts"], batch["events"], batch["data_parallel_rank"]
            assert [event["type"] for event in events] == ["AllBlocksCleared", "BlockStored"]
        assert rank == 1
        assert at > 0
        replay = context.socket(zmq.DEALER)  # a REQ socket would take the first of several answers only
        replay.setsockopt(zmq.RCVTIMEO, 5000)
        replay.connect(of_rank(replay_endpoint, 1))
        replay.send_multipart((b"", (0).to_bytes(8, "big")))
        again = []
        while True:
            _, key, kept = replay.recv_multipart()
            if not kept:
                break
            again.append((int.from_bytes(key, "big"), kept))
        assert int.from_bytes(key, "big", signed=True) == -1
        assert [each for each, _ in again] == list(range(number + 1))[-3:], "no more batches are kept"
        assert again[-1][1] == payload


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON"),
        ("[]", "JSON object"),
        ('{"port": 1}', "there are enable_kv_cache_events"),
        ('{"endpoint": "localhost:5557"}', "tcp://"),
        ('{"buffer_steps": -1}', "from 0 on"),
        ('{"publisher": "kafka"}', "null, zmq"),
        ('{"enable_kv_cache_events": 1}', "true or false"),
    ],
)
def test_configurations_that_are_none_are_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SchedulerConfig(listen=("unix:s",), worker_socket=Path("w"), kv_events_config=text)


def test_a_replica_adds_its_number_to_its_addresses() -> None:
    assert of_rank("tcp://*:5557", 0) == "tcp://*:5557"
    assert of_rank("tcp://*:5557", 2) == "tcp://*:5559"
    assert of_rank("inproc://kv", 1) == "inproc://kv_dp1"
