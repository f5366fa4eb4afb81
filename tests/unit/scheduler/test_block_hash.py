"""Hashes of blocks: chained, and the same whether computed or remembered."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from pagewire.wire import block_hashes
from pagewire.wire.block_hashes import ROOT_HASH, RecentChains, hash_blocks, root_hash

PROMPTS = st.lists(st.integers(0, 1), max_size=12)


@given(st.lists(PROMPTS, max_size=8), st.integers(1, 3))
def test_a_remembered_beginning_gives_the_hashes_that_hashing_all_gives(
    prompts: list[list[int]], block_size: int
) -> None:
    chains = RecentChains(block_size)
    for prompt in prompts:
        full = array("I", prompt[: len(prompt) // block_size * block_size])
        hashes = chains.hash(array("I", prompt))
        assert hashes == hash_blocks(ROOT_HASH, full, block_size)
        hashes.append(b"the caller's own")


def test_only_so_many_chains_are_remembered() -> None:
    chains = RecentChains(1)
    for token_id in range(3 * block_hashes._MAX_CHAINS):
        chains.hash(array("I", [token_id]))
    assert len(chains._chains) == block_hashes._MAX_CHAINS


def test_a_chain_may_be_continued_where_it_was_left() -> None:
    tokens = array("I", range(12))
    whole = hash_blocks(ROOT_HASH, tokens, 4)
    assert hash_blocks(whole[0], tokens[4:], 4) == whole[1:]


def test_a_salt_is_never_a_block() -> None:
    tokens = array("I", b"four bytes a token, sixteen of those is a block of sixty-four...".ljust(64)[:64])
    salt = tokens.tobytes().decode()
    assert root_hash(salt) != hash_blocks(ROOT_HASH, tokens, len(tokens))[0]
