"""Records and rings with mutated bytes are taken or refused, never anything else.

`python -m tools.fuzz_dispatch` does so by the million.
"""

from __future__ import annotations

import random

import pytest

from tools.fuzz_dispatch import PlanTarget, ResultTarget, RingTarget, fuzz


@pytest.mark.parametrize("make_target", [PlanTarget, ResultTarget, RingTarget])
@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_bytes_are_taken_or_refused(make_target, seed: int) -> None:
    outcomes = fuzz(make_target(), 1000, random.Random(seed))
    assert set(outcomes) == {"taken", "refused"}
