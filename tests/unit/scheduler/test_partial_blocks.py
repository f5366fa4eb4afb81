"""What is found by its first tokens, and from when on."""

from __future__ import annotations

from array import array

from scheduler.blocks.partial import _MAX_CANDIDATES, PartialBlocks, PartialHit, Place

PARENT, OTHER = (b"parent", "client"), (b"other", "client")


def tokens(*ids: int) -> array[int]:
    return array("I", ids)


def put(partial: PartialBlocks, block_id: int, place: Place, *ids: int) -> int | None:
    return partial.put(block_id, place, tokens(*ids))


def test_the_block_with_the_most_tokens_in_common_is_found() -> None:
    partial = PartialBlocks(40)
    put(partial, 0, PARENT, 1, 2, 3, 9)
    put(partial, 1, PARENT, 1, 2)
    put(partial, 2, PARENT, 5)
    put(partial, 3, OTHER, 1, 2, 3, 4)
    partial.begin_step()
    assert partial.find(PARENT, tokens(1, 2, 3, 4)) == PartialHit(0, 3)
    assert partial.find(OTHER, tokens(1, 2, 3, 4, 5)) == PartialHit(3, 4)
    assert partial.find(PARENT, tokens(1, 7)) == PartialHit(1, 1), "of equal ones the latest"
    assert partial.find(PARENT, tokens(2)) is None
    assert partial.find((b"unknown", "client"), tokens(1)) is None
    assert partial.find((b"parent", "another"), tokens(1, 2)) is None


def test_what_a_step_computes_is_not_copied_in_it() -> None:
    partial = PartialBlocks(40)
    partial.begin_step()
    put(partial, 0, PARENT, 1, 2)
    assert partial.find(PARENT, tokens(1, 2)) is None
    partial.begin_step()
    assert partial.find(PARENT, tokens(1, 2)) == PartialHit(0, 2)
    put(partial, 0, PARENT, 1, 2, 3)
    assert partial.find(PARENT, tokens(1, 2, 3)) is None
    partial.begin_step()
    assert partial.find(PARENT, tokens(1, 2, 3)) == PartialHit(0, 3)


def test_few_of_those_that_follow_the_same_are_remembered() -> None:
    partial = PartialBlocks(40)
    for block_id in range(_MAX_CANDIDATES):
        assert put(partial, block_id, PARENT, block_id) is None
    assert put(partial, _MAX_CANDIDATES, PARENT, _MAX_CANDIDATES) == 0
    partial.begin_step()
    partial.check()
    assert 0 not in partial
    assert partial.find(PARENT, tokens(0)) is None
    assert partial.find(PARENT, tokens(1)) == PartialHit(1, 1)
    for block_id in range(1, _MAX_CANDIDATES + 1):
        partial.drop(block_id)
    partial.check()
    assert partial.find(PARENT, tokens(1)) is None
