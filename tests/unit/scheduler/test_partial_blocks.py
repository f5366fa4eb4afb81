"""What is found by its first tokens, and from when on."""

from __future__ import annotations

from array import array

from scheduler.partial_blocks import _MAX_CANDIDATES, PartialBlocks, PartialHit

PARENT, OTHER = b"parent", b"other"


def tokens(*ids: int) -> array[int]:
    return array("I", ids)


def test_the_block_with_the_most_tokens_in_common_is_found() -> None:
    partial = PartialBlocks()
    partial.put(0, PARENT, tokens(1, 2, 3, 9))
    partial.put(1, PARENT, tokens(1, 2))
    partial.put(2, PARENT, tokens(5))
    partial.put(3, OTHER, tokens(1, 2, 3, 4))
    partial.begin_step()
    assert partial.find(PARENT, tokens(1, 2, 3, 4)) == PartialHit(0, 3)
    assert partial.find(OTHER, tokens(1, 2, 3, 4, 5)) == PartialHit(3, 4)
    assert partial.find(PARENT, tokens(1, 7)) == PartialHit(1, 1), "of equal ones the latest"
    assert partial.find(PARENT, tokens(2)) is None
    assert partial.find(b"unknown", tokens(1)) is None


def test_what_a_step_computes_is_not_copied_in_it() -> None:
    partial = PartialBlocks()
    partial.begin_step()
    partial.put(0, PARENT, tokens(1, 2))
    assert partial.find(PARENT, tokens(1, 2)) is None
    partial.begin_step()
    assert partial.find(PARENT, tokens(1, 2)) == PartialHit(0, 2)
    partial.put(0, PARENT, tokens(1, 2, 3))
    assert partial.find(PARENT, tokens(1, 2, 3)) is None
    partial.begin_step()
    assert partial.find(PARENT, tokens(1, 2, 3)) == PartialHit(0, 3)


def test_few_of_those_that_follow_the_same_are_remembered() -> None:
    partial = PartialBlocks()
    for block_id in range(_MAX_CANDIDATES + 1):
        partial.put(block_id, PARENT, tokens(block_id))
    partial.begin_step()
    partial.check()
    assert 0 not in partial
    assert partial.find(PARENT, tokens(0)) is None
    assert partial.find(PARENT, tokens(1)) == PartialHit(1, 1)
    for block_id in range(1, _MAX_CANDIDATES + 1):
        partial.drop(block_id)
    partial.check()
    assert partial.find(PARENT, tokens(1)) is None
