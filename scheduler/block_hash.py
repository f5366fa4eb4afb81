"""What names a full KV block: a hash of all tokens up to its end."""

from __future__ import annotations

from array import array
from hashlib import blake2b

BlockHash = bytes
ROOT_HASH: BlockHash = b""


def hash_blocks(parent: BlockHash, token_ids: array[int], block_size: int) -> list[BlockHash]:
    """The chained hashes of consecutive full blocks: each 16 bytes over its parent's hash and its tokens.

    A cryptographic hash, because a collision would hand one user another's context.

    Args:
        parent: of the block before, or ROOT_HASH.
        token_ids: of the blocks, a whole number of them.
        block_size: tokens per block.
    """
    assert len(token_ids) % block_size == 0
    content, num_bytes = token_ids.tobytes(), block_size * token_ids.itemsize
    hashes = []
    for begin in range(0, len(content), num_bytes):
        parent = blake2b(parent + content[begin : begin + num_bytes], digest_size=16).digest()
        hashes.append(parent)
    return hashes
