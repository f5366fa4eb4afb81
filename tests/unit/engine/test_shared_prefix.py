"""The prefix that decodes share: found where it saves reads, and never longer than what is shared."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cuda import shared_prefix
from engine.cuda.shared_prefix import find_shared_prefix

BLOCK_SIZE = 16


def table(*rows: list[int]) -> np.ndarray:
    width = max(map(len, rows))
    return np.array([row + [0] * (width - len(row)) for row in rows])


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "MIN_SAVED_TOKENS", BLOCK_SIZE)


def find(tables: np.ndarray, num_full: list[int]) -> tuple[int, int, list[bool]] | None:
    found = find_shared_prefix(tables, np.arange(len(tables)), np.array(num_full), BLOCK_SIZE)
    return None if found is None else (found.row, found.num_tokens, found.shares.tolist())


def test_requests_with_the_same_first_blocks_share_them() -> None:
    tables = table([1, 2, 3, 9], [1, 2, 3, 8], [5, 6, 7, 4])
    assert find(tables, [3, 3, 3]) == (0, 48, [True, True, False])


def test_the_length_is_the_one_that_saves_most() -> None:
    tables = table([1, 2, 3, 4], [1, 2, 3, 4], *([1, n, n, n] for n in (6, 7, 8, 9)))
    assert find(tables, [4] * 6) == (0, 16, [True] * 6)
    assert find(tables[:3], [4] * 3) == (0, 64, [True, True, False])


def test_blocks_not_wholly_before_the_newest_token_are_not_shared() -> None:
    tables = table([1, 2, 3], [1, 2, 3])
    assert find(tables, [3, 2]) == (0, 32, [True, True])
    assert find(tables, [1, 0]) is None


def test_little_saved_is_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "MIN_SAVED_TOKENS", 49)
    assert find(table([1, 2, 3, 9], [1, 2, 3, 8]), [4, 4]) is None


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_what_is_found_is_shared(rows: list[list[int]], random) -> None:
    tables = table(*rows)
    num_full = [random.randint(0, len(row)) for row in rows]
    found = find(tables, num_full)
    if found is None:
        return
    row, num_tokens, shares = found
    assert shares[row]
    num_blocks = num_tokens // BLOCK_SIZE
    for i, sharing in enumerate(shares):
        if sharing:
            assert num_full[i] >= num_blocks
            assert (tables[i, :num_blocks] == tables[row, :num_blocks]).all()
