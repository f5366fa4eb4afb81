"""KV groups: what requests hold in groups with a window, what of a prefix can be shared, and what fits."""

from __future__ import annotations

from array import array
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.dispatch.limits import EngineLimits, fewest_blocks, longest_request
from engine.dispatch.records import StepPlan
from engine.dispatch.sampling import SamplingRecord
from engine.models.kv_groups import kv_groups
from pagewire.wire.block_hashes import ROOT_HASH, hash_blocks
from scheduler.blocks.groups import NO_BLOCK, KVGroups
from scheduler.blocks.pool import BlockPool
from scheduler.core import Scheduler
from scheduler.request import EndReason, Request
from scheduler.settings import CoreSettings
from tests.unit.scheduler.executor import MiniatureWorker, continuation

VOCAB = 50
BLOCK_SIZE = 4


def limits(kv_windows: tuple[int, ...], num_blocks: int, **changes: int) -> EngineLimits:
    values = {"max_model_len": 200, "block_size": BLOCK_SIZE, "max_num_seqs": 4, "max_num_batched_tokens": 32}
    return EngineLimits(vocab_size=VOCAB, kv_windows=kv_windows, num_blocks=num_blocks, **values | changes)


class Engine:
    """A core one step ahead of a miniature worker, which checks what every step reads."""

    def __init__(self, limits: EngineLimits, *, caching: bool = True) -> None:
        self.core = Scheduler(limits, CoreSettings(enable_prefix_caching=caching))
        self.worker = MiniatureWorker(
            limits.block_size,
            limits.vocab_size,
            limits.max_num_batched_tokens,
            limits.max_num_seqs,
            limits.kv_windows,
        )
        self.in_flight: deque[StepPlan] = deque()
        self.added: list[tuple[Request, list[int]]] = []

    def add(self, prompt: list[int], num_tokens: int = 1) -> Request:
        name = f"r{len(self.added)}"
        tokens = array("I", prompt)
        request = Request(name, tokens, len(prompt), SamplingRecord(), len(prompt) + num_tokens)
        self.core.add(request)
        self.added.append((request, prompt))
        return request

    def step(self) -> bool:
        """Plans a step if there is room for it in flight, or else runs the oldest. False if all is done."""
        plan = self.core.schedule() if len(self.in_flight) < 2 else None
        if plan is not None:
            self.in_flight.append(plan)
        elif self.in_flight:
            self.core.update(self.worker.execute(self.in_flight.popleft()))
        else:
            return False
        self.core.pool.check()
        return True

    def run(self) -> int:
        """Until all is done; the most blocks in use between two steps. Everybody got the model's tokens."""
        most = 0
        while self.step():
            most = max(most, self.core.pool.num_used)
        for request, prompt in self.added:
            assert request.end_reason is EndReason.LENGTH
            count = request.max_total_tokens - len(prompt)
            assert request.token_ids.tolist() == prompt + continuation(prompt, count, VOCAB)
        assert self.core.pool.num_used == 0
        return most


def some(length: int, seed: int = 0) -> list[int]:
    return [(seed * 17 + i * i) % VOCAB for i in range(length)]


@pytest.mark.parametrize("caching", [True, False])
def test_a_request_holds_its_window_and_gives_back_what_is_behind_it(caching: bool) -> None:
    engine = Engine(limits((0, 10, 10), 200), caching=caching)
    request = engine.add(some(50), 100)
    while engine.step():
        if request.row >= 0:
            num_computed = int(engine.core._rows.num_computed[request.row])
            tables = [request.block_ids[group::3] for group in range(3)]
            num_passed = max(num_computed - 10 + 1, 0) // BLOCK_SIZE
            assert NO_BLOCK not in tables[0]
            for table in tables[1:]:
                assert table[:num_passed] == [NO_BLOCK] * num_passed
                assert NO_BLOCK not in table[num_passed:]
    engine.run()


def test_gemma_3_holds_a_fifth_at_32k() -> None:
    """62 layers, of which every sixth sees everything and the others 1024 tokens."""
    layers = tuple(0 if layer % 6 == 5 else 1024 for layer in range(62))
    groups = kv_groups(layers, 32_768)
    changes = {"max_model_len": 32_768, "block_size": 16, "max_num_batched_tokens": 4096}
    core = Scheduler(limits(groups.windows, 8000, **changes))
    core.add(Request("long", array("I", some(32_000)), 32_000, SamplingRecord(), 32_768))
    for _ in range(8):
        plan = core.schedule()
        assert plan is not None
    assert plan.samples.tolist() == [1], "the prompt is planned, and 8 steps are in flight"
    held = core.pool.num_used * groups.group_size
    assert held == 10 * 32_000 // 16 + 60 * 1024 // 16
    assert held < 0.2 * 62 * 32_000 // 16


def test_the_blocks_behind_a_window_serve_others_at_once() -> None:
    """Two requests whose tokens do not fit together, but their windows do."""
    engine = Engine(limits((8,), 16, max_num_batched_tokens=12))
    first, second = engine.add(some(60, 1), 40), engine.add(some(60, 2), 40)
    most = engine.run()
    assert engine.core.counters.num_preemptions == 0
    assert first.max_total_tokens + second.max_total_tokens > 16 * BLOCK_SIZE
    assert most <= 16


def test_a_request_fits_that_needs_few_blocks_at_once() -> None:
    """A full group's 50 blocks, and a window and a block in two others: though chunks could be longer."""
    needed = 50 + 2 * (2 + 1)
    with pytest.raises(ValueError, match=f"needs {needed} KV blocks, the pool has {needed - 1}"):
        limits((0, 8, 8), needed - 1)
    engine = Engine(limits((0, 8, 8), needed))
    engine.add(some(190), 10)
    assert engine.run() <= needed
    assert engine.core.counters.num_preemptions == 0


@pytest.mark.parametrize("kv_windows", [(0,), (8,), (0, 9), (0, 0, 5, 3), (1,)])
@pytest.mark.parametrize("num_blocks", [0, 1, 3, 8, 11, 40])
def test_the_longest_request_is_the_longest_that_fits(kv_windows: tuple[int, ...], num_blocks: int) -> None:
    longest = longest_request(100, num_blocks, BLOCK_SIZE, kv_windows)
    assert fewest_blocks(longest, BLOCK_SIZE, kv_windows) <= num_blocks
    assert longest == 100 or fewest_blocks(longest + 1, BLOCK_SIZE, kv_windows) > num_blocks


@given(
    windows=st.lists(st.sampled_from([0, 0, 1, 2, 5, 8, 9]), min_size=1, max_size=4),
    missing=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 7)), max_size=6),
)
def test_a_prefix_ends_where_every_group_has_what_the_next_token_sees(
    windows: list[int], missing: set[tuple[int, int]]
) -> None:
    groups, pool = KVGroups(windows, BLOCK_SIZE), BlockPool(64)
    hashes = hash_blocks(ROOT_HASH, array("I", range(8 * BLOCK_SIZE)), BLOCK_SIZE)
    there = {}
    for group in range(len(windows)):
        for index, block_hash in enumerate(hashes):
            if (group, index) not in missing:
                (there[group, index],) = pool.allocate(1)
                pool.publish(there[group, index], groups.key(block_hash, group))

    def seen(group: int, end: int) -> range:
        oldest = max(0, end * BLOCK_SIZE - windows[group] + 1) if windows[group] else 0
        return range(oldest // BLOCK_SIZE, end)

    ends = [
        end
        for end in range(9)
        if all((group, i) in there for group in range(len(windows)) for i in seen(group, end))
    ]
    hits = groups.lookup(pool, hashes)
    assert len(hits) == ends[-1] * len(windows)
    for place, block_id in enumerate(hits):
        index, group = divmod(place, len(windows))
        assert block_id == (there[group, index] if index in seen(group, ends[-1]) else NO_BLOCK)


def test_a_prefix_is_found_again_though_blocks_behind_its_windows_were_reused() -> None:
    engine = Engine(limits((0, 8), 80))
    prompt = some(100)
    first = engine.add(prompt)
    engine.run()
    # Those that were given back first are reused first.
    engine.core.pool.release(engine.core.pool.allocate(80 - 2 * 25 + 5))
    assert engine.core.pool.num_evictions >= 5
    second = engine.add([*prompt, 1, 2, 3], 8)
    engine.run()
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == 100


def test_a_prefix_without_its_last_window_is_not_found() -> None:
    engine = Engine(limits((0, 8), 80))
    engine.add(some(100))
    engine.run()
    fork = engine.add([*some(60), 49, 49, 49])
    engine.core.schedule()
    assert fork.num_cached_tokens == 60, "what was given back is still there"
    engine.core.abort(fork)
    pool = engine.core.pool
    kept = pool.lookup(hash_blocks(ROOT_HASH, array("I", some(100)), BLOCK_SIZE))
    assert len(kept) == 25, "the first group has all of it"
    pool.acquire(kept)
    pool.release(pool.allocate(pool.num_free))  # everything else is reused
    pool.release(kept)
    again = engine.add([*some(60), 48, 48, 48])
    engine.core.schedule()
    assert again.num_cached_tokens == 0


def test_samples_of_a_prompt_share_its_blocks_and_copy_the_last_in_every_group() -> None:
    engine = Engine(limits((0, 6, 9), 100))
    prompt = some(31)
    engine.add(prompt, 12)
    engine.step()
    engine.step()
    other = engine.add(prompt, 12)
    while other.num_cached_tokens < 0:
        engine.step()
    assert other.num_cached_tokens == 30
    copies = engine.in_flight[-1].copied_blocks
    assert len(copies) == 3
    engine.run()


def test_a_large_chunk_takes_what_is_free_and_preempts_nobody() -> None:
    engine = Engine(limits((0, 8), 50, max_num_batched_tokens=64, max_model_len=130))
    early = engine.add(some(10, 1), 40)
    engine.step()
    late = engine.add(some(120, 2), 4)
    engine.run()
    assert engine.core.counters.num_preemptions == 0
    assert early.max_total_tokens < late.max_total_tokens
