"""Finds a prefix that many of a step's decodes share, so that attention reads it once for all of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.attention.interface import IntArray

# The least number of context tokens whose reads must be saved to pay for the extra launch in each layer.
MIN_SAVED_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """A prefix that several requests hold in the same blocks.

    Attributes:
        row: the row of one of these requests.
        num_tokens: the prefix's length, a multiple of the block size.
        shares: whether each request has the prefix, [S] bool.
    """

    row: int
    num_tokens: int
    shares: np.ndarray


def find_shared_prefix(
    block_table: IntArray, rows: IntArray, num_full_blocks: IntArray, block_size: int
) -> SharedPrefix | None:
    """The prefix that saves the most reads, or None if none saves enough.

    Considers only requests whose first block is the most common one.

    Args:
        block_table: block ids by row, [R, B].
        rows: the requests' rows, [S].
        num_full_blocks: number of full blocks before each request's newest token, [S].
        block_size: tokens per block.
    """
    if len(rows) * int(num_full_blocks.max(initial=0)) * block_size < MIN_SAVED_TOKENS:
        return None
    first = block_table[rows, 0]
    counts = np.bincount(first[num_full_blocks > 0], minlength=1)
    candidates = np.flatnonzero((first == counts.argmax()) & (num_full_blocks > 0))
    if len(candidates) < 2:
        return None
    # Shared prefixes are looked for between the longest candidate and each of the others.
    longest = candidates[num_full_blocks[candidates].argmax()]
    width = int(num_full_blocks[longest])
    tables = block_table[rows[candidates], :width]
    same = (tables == tables[candidates == longest]) & (
        np.arange(width) < num_full_blocks[candidates][:, None]
    )
    lengths = np.where(same.all(axis=1), width, same.argmin(axis=1))
    sorted_lengths = np.sort(lengths)[::-1]
    # If the k requests with the longest common prefixes share one, k - 1 of k reads are saved.
    saved = sorted_lengths * np.arange(len(sorted_lengths)) * block_size
    best = int(saved.argmax())
    if saved[best] < MIN_SAVED_TOKENS:
        return None
    num_blocks = int(sorted_lengths[best])
    shares = np.zeros(len(rows), dtype=bool)
    shares[candidates[lengths >= num_blocks]] = True
    return SharedPrefix(int(rows[np.flatnonzero(shares)[0]]), num_blocks * block_size, shares)
