"""Finds the prefix that most of a step's decodes share, so that attention reads it once for all of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.attention.interface import IntArray

# Reads of context that must be saved, in tokens, for the extra launch in each layer to be worth it.
MIN_SAVED_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """A prefix that several requests hold in the same blocks.

    Attributes:
        row: one of them.
        num_tokens: its length, a multiple of the block size.
        shares: whether each request has it, [S] bool.
    """

    row: int
    num_tokens: int
    shares: np.ndarray


def find_shared_prefix(
    block_table: IntArray, rows: IntArray, num_full_blocks: IntArray, block_size: int
) -> SharedPrefix | None:
    """The prefix that saves the most reads, or None if none saves enough.

    Only prefixes of the requests that begin with the commonest first block are looked at.

    Args:
        block_table: block ids by row, [R, B].
        rows: of the requests, [S].
        num_full_blocks: blocks of each that lie wholly before its newest token, [S].
    """
    if len(rows) * int(num_full_blocks.max(initial=0)) * block_size < MIN_SAVED_TOKENS:
        return None
    first = block_table[rows, 0]
    counts = np.bincount(first[num_full_blocks > 0], minlength=1)
    candidates = np.flatnonzero((first == counts.argmax()) & (num_full_blocks > 0))
    if len(candidates) < 2:
        return None
    # The longest holds every prefix that two of them can share with it.
    longest = candidates[num_full_blocks[candidates].argmax()]
    width = int(num_full_blocks[longest])
    tables = block_table[rows[candidates], :width]
    same = (tables == tables[candidates == longest]) & (
        np.arange(width) < num_full_blocks[candidates][:, None]
    )
    lengths = np.where(same.all(axis=1), width, same.argmin(axis=1))
    sorted_lengths = np.sort(lengths)[::-1]
    # With the k longest sharing, all but one of k readers are saved.
    saved = sorted_lengths * np.arange(len(sorted_lengths)) * block_size
    best = int(saved.argmax())
    if saved[best] < MIN_SAVED_TOKENS:
        return None
    num_blocks = int(sorted_lengths[best])
    shares = np.zeros(len(rows), dtype=bool)
    shares[candidates[lengths >= num_blocks]] = True
    return SharedPrefix(int(rows[np.flatnonzero(shares)[0]]), num_blocks * block_size, shares)
