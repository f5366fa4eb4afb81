"""How times are summed up."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.bench.percentiles import percentile, spread


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=200))
def test_a_spread_is_ordered_and_within_its_values(values: list[float]) -> None:
    result = spread(values)
    assert result is not None
    inside = [result[name] for name in ("p50", "p90", "p99", "max")]
    assert inside == sorted(inside)
    low, high = round(min(values) * 1000, 3), round(max(values) * 1000, 3)
    assert low <= result["p50"]
    assert result["max"] == high
    assert low - 0.001 <= result["mean"] <= high + 0.001
    assert spread([*values, math.nan]) == result


def test_percentiles_interpolate() -> None:
    values = [0.001, 0.002, 0.004]
    assert spread(np.array(values)) == {"mean": 2.333, "p50": 2, "p90": 3.6, "p99": 3.96, "max": 4}
    assert percentile(values, 90) == pytest.approx(0.0036)
    assert percentile([7.0], 99) == 7


def test_nothing_has_no_spread() -> None:
    assert spread([]) is None
    assert spread([math.nan]) is None
