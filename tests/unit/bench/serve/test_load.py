"""When requests are due."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.base.errors import ConfigError
from pagewire.bench.serve.load import Load


@given(
    rate=st.floats(0.1, 1e4),
    burstiness=st.floats(0.1, 10),
    count=st.integers(1, 200),
    duration=st.none() | st.floats(0.01, 10),
    seed=st.integers(0, 9),
)
def test_arrivals_are_in_order_bounded_and_the_same_for_a_seed(
    rate: float, burstiness: float, count: int, duration: float | None, seed: int
) -> None:
    load = Load(rate=rate, burstiness=burstiness, num_requests=count, duration=duration, seed=seed)
    offsets = list(load.offsets())
    assert offsets == sorted(offsets) == list(load.offsets())
    assert offsets[0] == 0
    assert len(offsets) <= count
    if duration is None:
        assert len(offsets) == count
    else:
        assert offsets[-1] < duration


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_rates_mean_and_the_burstiness_spread(burstiness: float) -> None:
    load = Load(rate=50, burstiness=burstiness, num_requests=20_001)
    gaps = [after - before for before, after in itertools.pairwise(load.offsets())]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.05)
    # of a gamma distribution, (standard deviation / mean)^2 is 1 / shape; 1 is a Poisson process
    assert (statistics.stdev(gaps) * 50) ** 2 == pytest.approx(1 / burstiness, rel=0.1)


def test_other_seeds_are_other_arrivals() -> None:
    assert list(Load(rate=1, num_requests=9).offsets()) != list(
        Load(rate=1, num_requests=9, seed=1).offsets()
    )


def test_a_duration_alone_has_as_many_as_come() -> None:
    assert len(list(Load(rate=100, duration=5).offsets())) == pytest.approx(500, rel=0.15)


def test_loads_by_name() -> None:
    assert str(Load(num_requests=3)) == "all at once"
    assert str(Load(rate=8, num_requests=3)) == "8 per second"
    assert str(Load(concurrency=64, duration=3)) == "64 at a time"
    assert str(Load(rate=0.5, concurrency=2, num_requests=3)) == "0.5 per second, 2 at a time"


@pytest.mark.parametrize(
    "fields",
    [{}, {"duration": 5}, {"rate": 0, "num_requests": 1}, {"rate": 1}, {"num_requests": 1, "burstiness": -1}],
)
def test_what_has_no_end_or_no_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Load(**fields)
