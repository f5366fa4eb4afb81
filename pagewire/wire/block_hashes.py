"""Hashes that identify full KV blocks: each covers all tokens up to the block's end."""

from __future__ import annotations

from array import array
from hashlib import blake2b

import numpy as np

BlockHash = bytes
HASH_BYTES = 16
ROOT_HASH: BlockHash = b""
"""The parent hash of a first block, unless `root_hash` gives another."""

_MAX_CHAINS = 64


def root_hash(cache_salt: str, adapter_id: int = 0) -> BlockHash:
    """The parent hash of first blocks. Only requests with the same salt and adapter share blocks."""
    if not cache_salt and not adapter_id:
        return ROOT_HASH
    # Personalized, because a salt may have the same bytes as a block's tokens.
    salt = adapter_id.to_bytes(8, "little") if adapter_id else b""
    return blake2b(cache_salt.encode(), digest_size=HASH_BYTES, person=b"salt", salt=salt).digest()


def hash_blocks(parent: BlockHash, token_ids: array[int], block_size: int) -> list[BlockHash]:
    """The chained hashes of consecutive full blocks, HASH_BYTES each, over the parent's hash and the tokens.

    The hash is cryptographic, because a collision would give one user another's context.

    Args:
        parent: hash of the block before, or a root.
        token_ids: the blocks' tokens; a multiple of the block size.
        block_size: tokens per block.
    """
    assert len(token_ids) % block_size == 0
    content, num_bytes = token_ids.tobytes(), block_size * token_ids.itemsize
    hashes = []
    for begin in range(0, len(content), num_bytes):
        parent = blake2b(parent + content[begin : begin + num_bytes], digest_size=HASH_BYTES).digest()
        hashes.append(parent)
    return hashes


class RecentChains:
    """A cache of recent hash chains. The common prefix of many prompts is hashed once and then compared,
    which is a hundred times cheaper. Of chains with the same root and first block, the latest is kept.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._chains: dict[bytes, tuple[array[int], list[BlockHash]]] = {}

    def hash(self, token_ids: array[int], root: BlockHash = ROOT_HASH) -> list[BlockHash]:
        """The hashes of a prompt's full blocks; `root` is the parent of the first."""
        block_size = self.block_size
        token_ids = token_ids[: len(token_ids) // block_size * block_size]
        first = root + token_ids[:block_size].tobytes()
        known_ids, known = self._chains.pop(first, (token_ids[:0], []))
        num_shared = _common_length(token_ids, known_ids) // block_size
        hashes = known[:num_shared]
        parent = hashes[-1] if hashes else root
        hashes += hash_blocks(parent, token_ids[num_shared * block_size :], block_size)
        self._chains[first] = token_ids, hashes
        if len(self._chains) > _MAX_CHAINS:
            del self._chains[next(iter(self._chains))]
        return hashes.copy()


def _common_length(a: array[int], b: array[int]) -> int:
    length = min(len(a), len(b))
    if length == 0:
        return 0
    differs = np.frombuffer(a, np.uint32, length) != np.frombuffer(b, np.uint32, length)
    first = int(differs.argmax())
    return first if differs[first] else length
