"""What people who watch the scheduler are told: bounded, and true."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from engine.dispatch.records import StepResult
from engine.dispatch.sampling import u32
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from pagewire.scheduler.v1 import scheduler_pb2_grpc
from scheduler.blocks.pool import BlockPool
from scheduler.blocks.prefix_tree import prefix_tree
from scheduler.serve.metrics import SchedulerMetrics
from scheduler.serve.observation import MAX_PLACES, MAX_STEPS, Latencies, Observer, _stride
from tests.unit.scheduler.test_service import WorkerThread, request, served


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerThread]:
    worker = WorkerThread(tmp_path / "worker.sock")
    worker.step_seconds = 0.005
    yield worker
    worker.close()


@pytest.fixture
async def stub(
    worker: WorkerThread, tmp_path: Path
) -> AsyncIterator[scheduler_pb2_grpc.SchedulerServiceStub]:
    async with served(tmp_path) as stub:
        yield stub


def held_chain(pool: BlockPool, names: list[bytes]) -> list[int]:
    """Blocks of one request whose hashes are 16 bytes that end in these names, each the next one's parent."""
    hashes = [name.rjust(16, b"-") for name in names]
    found = pool.lookup(hashes)
    pool.acquire(found)
    blocks = [*found, *pool.allocate(len(names) - len(found))]
    for index, (block_id, block_hash) in enumerate(zip(blocks, hashes, strict=True)):
        pool.publish(block_id, block_hash, hashes[index - 1] if index else b"")
    return blocks


async def observed(
    call: AsyncIterator[pb.ObserveResponse], condition: Callable[[pb.ObserveResponse], object]
) -> pb.ObserveResponse:
    async with asyncio.timeout(10):
        async for message in call:
            if condition(message):
                return message
    raise AssertionError("the stream ended")


async def test_running_requests_their_blocks_and_steps_are_told(stub) -> None:
    call = stub.Observe(pb.ObserveRequest(interval=0.1))
    generating = stub.Generate(request(list(range(1, 13)), 100))
    message = await observed(call, lambda message: message.requests and message.steps)
    [told] = message.requests
    assert message.ready
    assert told.running
    assert told.num_prompt_tokens == 12
    assert told.num_blocks == len([owner for owner in message.blocks.owners if owner == 1])
    assert sum(message.blocks.ref_counts) == message.load.num_used_blocks == told.num_blocks
    assert sum(message.blocks.cached) >= 3
    assert [each.execute_us[0] for each in message.steps] == [5000] * len(message.steps)
    assert message.inter_token_latency.count > 0
    assert 0.004 < message.inter_token_latency.p50 <= message.inter_token_latency.p95
    generating.cancel()


async def test_a_lost_worker_is_told(stub, worker) -> None:
    call = stub.Observe(pb.ObserveRequest(interval=0.1))
    assert (await observed(call, lambda message: True)).ready
    worker.may_serve.clear()
    worker.leave_at = 1
    generating = stub.Generate(request([1, 2, 3], 100))
    message = await observed(call, lambda message: not message.ready)
    assert message.totals.worker_losses == 1
    assert message.load.num_requests_waiting == 1
    assert not message.requests
    worker.may_serve.set()
    assert (await observed(call, lambda message: message.ready)).prefixes is not None
    generating.cancel()


async def test_nobody_is_observed_after_the_call(tmp_path, worker) -> None:
    async with served(tmp_path) as stub:
        call = stub.Observe(pb.ObserveRequest(interval=0.1))
        await call.read()
        call.cancel()
        assert (await stub.GetLoad(pb.GetLoadRequest())).num_blocks == 64


def test_prefixes_are_told_as_a_tree_with_hits() -> None:
    pool = BlockPool(32)
    first = held_chain(pool, [b"system", b"more", b"a1", b"a2"])
    second = held_chain(pool, [b"system", b"more", b"b1"])
    pool.release(first)
    tree = prefix_tree(pool, max_blocks=100, max_nodes=100)
    assert [(node.parent, node.block_ids, node.num_hits, node.num_held) for node in tree.nodes] == [
        (-1, first[:2], 1, 2),
        (0, first[2:], 0, 0),
        (0, second[2:], 0, 1),
    ]
    assert [tree.root_of(index) for index in range(3)] == [0, 0, 0]


def test_the_tree_is_bounded() -> None:
    pool = BlockPool(1000)
    for number in range(300):
        held_chain(pool, [b"%d" % number, b"%d next" % number])
    tree = prefix_tree(pool, max_blocks=100, max_nodes=10)
    assert len(tree.nodes) == 10
    assert 0 < tree.num_left_out <= 50


def test_a_reused_block_has_no_hits_of_what_was_there() -> None:
    pool = BlockPool(2)
    held_chain(pool, [b"old"])
    pool.release(held_chain(pool, [b"old"]))
    pool.release([0])
    pool.allocate(2)
    pool.publish(1, b"new".rjust(16))
    assert [(each.num_hits, each.block_hash.strip()) for each in pool.recently_cached()] == [(0, b"new")]


@pytest.mark.parametrize("num_blocks", [1, MAX_PLACES, MAX_PLACES + 1, 1_000_000])
def test_large_pools_are_told_of_in_part(num_blocks: int) -> None:
    assert 0 < len(range(0, num_blocks, _stride(num_blocks))) <= MAX_PLACES


def test_percentiles_count_how_often_each_value_was_measured() -> None:
    latencies = Latencies()
    latencies.add(0.3, 1)
    latencies.add(0.1, 98)
    latencies.add(0.2, 1)
    taken = latencies.take()
    assert (taken.count, taken.p50, taken.p95) == (100, 0.1, 0.1)
    assert latencies.take().count == 0


def test_of_many_steps_the_last_are_told() -> None:
    observer = Observer()
    for step_id in range(MAX_STEPS + 50):
        observer.step(StepResult(step_id, u32([])), None, [7, 8])
    message = observer.take(None, pb.GetLoadResponse(), SchedulerMetrics(lambda: None, "inflight"))
    assert (len(message.steps), message.num_steps_left_out) == (MAX_STEPS, 50)
    assert message.steps[-1].step_id == MAX_STEPS + 49
    assert list(message.steps[0].execute_us) == [7, 8]
