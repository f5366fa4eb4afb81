"""The block pool as a state machine: any order of allocate, share, publish, release keeps its invariants."""

from __future__ import annotations

from array import array

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pagewire.wire.block_hashes import ROOT_HASH, BlockHash, hash_blocks
from scheduler.blocks.partial import PartialHit
from scheduler.blocks.pool import BlockPool

NUM_BLOCKS = 14
PLACE = (ROOT_HASH, "")


def chain(*tokens: int) -> list[BlockHash]:
    """The hashes of blocks of one token each."""
    return hash_blocks(ROOT_HASH, array("I", tokens), 1)


class PoolMachine(RuleBasedStateMachine):
    """Holders are lists of blocks with known content; the model recounts everything from them."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.holders: list[tuple[list[int], list[bytes]]] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4), publish=st.booleans())
    def hold(self, tokens: list[int], publish: bool) -> None:
        hashes = chain(*tokens)
        hits = self.pool.lookup(hashes)
        needed = len(tokens) - len(hits)
        if needed > self.pool.num_free - self.pool.num_free_among(hits):
            return
        free_before = self.pool.num_free
        self.pool.acquire(hits)
        blocks = hits + self.pool.allocate(needed)
        assert self.pool.num_free <= free_before - needed
        if publish:
            for block_id, block_hash in zip(blocks, hashes, strict=True):
                self.pool.publish(block_id, block_hash)
            assert len(self.pool.lookup(hashes)) == len(hashes)
            partial = array("I", [tokens[-1]] * len(tokens))
            self.pool.remember(blocks[-1], PLACE, partial)
            self.pool.partial.begin_step()
            hit = self.pool.partial.find(PLACE, partial)
            assert hit is not None
            assert hit.num_tokens == len(partial)
        self.holders.append((blocks, hashes))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks, hashes = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        found = self.pool.lookup(hashes)
        self.pool.release(blocks)
        assert self.pool.lookup(hashes) == found, "releasing must not lose content"

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        assert self.pool.num_cached == 0
        assert self.pool.partial.find(PLACE, array("I", [0])) is None

    @invariant()
    def every_block_is_counted(self) -> None:
        self.pool.check()
        counts = [0] * NUM_BLOCKS
        for blocks, _ in self.holders:
            for block_id in blocks:
                counts[block_id] += 1
        assert [self.pool.ref_count(block_id) for block_id in range(NUM_BLOCKS)] == counts
        assert self.pool.num_used == sum(count > 0 for count in counts)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def _published(pool: BlockPool, *contents: int) -> tuple[list[int], list[bytes]]:
    hashes = chain(*contents)
    blocks = pool.allocate(len(contents))
    for block_id, block_hash in zip(blocks, hashes, strict=True):
        pool.publish(block_id, block_hash)
    return blocks, hashes


def test_least_recently_used_content_is_evicted_first_and_the_tail_before_the_head() -> None:
    pool = BlockPool(4)
    old, old_hashes = _published(pool, 1, 2)
    new, new_hashes = _published(pool, 3, 4)
    pool.release(old)
    pool.release(new)
    assert pool.allocate(1) == [old[1]]
    assert pool.lookup(old_hashes) == [old[0]]
    assert pool.allocate(2) == [old[0], new[1]]
    assert pool.lookup(new_hashes) == [new[0]]
    assert pool.num_evictions == 3


def test_blocks_without_content_are_reused_before_any_content_is_evicted() -> None:
    pool = BlockPool(3)
    cached, hashes = _published(pool, 1)
    plain = pool.allocate(2)
    pool.release(cached)
    pool.release(plain)
    assert set(pool.allocate(2)) == set(plain)
    assert pool.lookup(hashes) == cached


def test_blocks_that_are_found_by_their_first_tokens_are_kept_and_then_forgotten() -> None:
    pool = BlockPool(3)
    blocks, begin = pool.allocate(3), array("I", [7, 8])
    pool.remember(blocks[1], PLACE, begin)
    pool.partial.begin_step()
    pool.release(blocks)
    assert set(pool.allocate(2)) == {blocks[0], blocks[2]}
    assert pool.partial.find(PLACE, begin) == PartialHit(blocks[1], 2)
    assert pool.allocate(1) == [blocks[1]]
    assert pool.partial.find(PLACE, begin) is None


def test_blocks_that_are_not_full_push_few_full_ones_out() -> None:
    pool = BlockPool(64)
    cached, hashes = _published(pool, *range(20))
    pool.release(cached)
    for number in range(200):
        (block_id,) = pool.allocate(1)
        pool.remember(block_id, PLACE, array("I", [number]))
        pool.partial.begin_step()
        pool.release([block_id])
        pool.check()
    assert pool.lookup(hashes) == cached
    assert pool.partial.find(PLACE, array("I", [199])) is not None
    assert pool.partial.find(PLACE, array("I", [100])) is None


def test_equal_blocks_after_different_prefixes_have_different_hashes() -> None:
    assert chain(1, 7)[1] not in chain(7) + chain(2, 7)


def test_with_caching_off_nothing_is_found_again() -> None:
    pool = BlockPool(2, enable_caching=False)
    blocks, hashes = _published(pool, 1, 2)
    assert pool.lookup(hashes) == []
    pool.release(blocks)
    assert pool.num_free == 2
