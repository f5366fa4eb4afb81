"""Which replicas have which KV blocks, as far as they have told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pagewire.wire.block_hashes import HASH_BYTES, BlockHash


class PrefixIndex:
    """From a block's hash to the replicas that can share the block, as a number with a bit for each.

    A replica tells of a block only when it has been planned. Until then the block is expected where the
    request was sent: for one or two times `expect_seconds`, so that what never came is forgotten.

    Args:
        expect_seconds: how long an expectation is kept at least.
    """

    def __init__(self, expect_seconds: float = 1.0) -> None:
        self._holders: dict[BlockHash, int] = {}
        self._expected: dict[BlockHash, int] = {}
        self._expected_before: dict[BlockHash, int] = {}
        self._expect_seconds = expect_seconds
        self._renewed_at = 0.0

    def __len__(self) -> int:
        return len(self._holders)

    def stored(self, replica: int, hashes: bytes) -> None:
        """Notes blocks that a replica has. `hashes` are HASH_BYTES each, one behind the other."""
        holders, bit = self._holders, 1 << replica
        for block_hash in _each(hashes):
            holders[block_hash] = holders.get(block_hash, 0) | bit

    def removed(self, replica: int, hashes: bytes) -> None:
        """Notes blocks that a replica has no more."""
        for block_hash in _each(hashes):
            self._drop(block_hash, ~(1 << replica))

    def cleared(self, replica: int) -> None:
        """Notes that a replica has no block any more."""
        kept = ~(1 << replica)
        for block_hash in [each for each, holders in self._holders.items() if holders & ~kept]:
            self._drop(block_hash, kept)
        for expected in (self._expected, self._expected_before):
            for block_hash in expected:
                expected[block_hash] &= kept

    def _drop(self, block_hash: BlockHash, kept: int) -> None:
        left = self._holders.get(block_hash, 0) & kept
        if left:
            self._holders[block_hash] = left
        else:
            self._holders.pop(block_hash, None)

    def expect(self, replica: int, hashes: Sequence[BlockHash], now: float) -> None:
        """Notes blocks that a replica will have soon. `now`: seconds of any clock that does not go back."""
        if now - self._renewed_at > self._expect_seconds:
            self._expected_before, self._expected = self._expected, {}
            self._renewed_at = now
        expected, bit = self._expected, 1 << replica
        for block_hash in hashes:
            expected[block_hash] = expected.get(block_hash, 0) | bit

    def longest(self, hashes: Sequence[BlockHash], among: int) -> tuple[int, int]:
        """Who of some replicas has the longest prefix of a chain of blocks.

        Args:
            hashes: the blocks, first to last.
            among: the replicas to choose from, a bit for each.

        Returns:
            (replicas, number of blocks): those with the longest prefix, all of `among` if none has any.
        """
        holders, expected, before = self._holders, self._expected, self._expected_before
        num_blocks = 0
        for block_hash in hashes:
            having = holders.get(block_hash, 0) | expected.get(block_hash, 0) | before.get(block_hash, 0)
            if not having & among:
                break
            among &= having
            num_blocks += 1
        return among, num_blocks


def _each(hashes: bytes) -> Iterator[BlockHash]:
    return (hashes[begin : begin + HASH_BYTES] for begin in range(0, len(hashes), HASH_BYTES))
