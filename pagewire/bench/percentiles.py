"""How benchmarks sum up many times: everywhere alike, so that their figures can be compared."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

PERCENTILES = (50, 90, 99)


def percentile(values: Iterable[float] | npt.NDArray[np.float64], percent: float) -> float:
    """The value below which so many percent of the values lie, interpolated between the nearest two."""
    return float(np.percentile(_array(values), percent))


def spread(seconds: Iterable[float] | npt.NDArray[np.float64]) -> dict[str, float] | None:
    """Mean, percentiles and maximum in milliseconds; None of nothing. NaN is left out."""
    values = _array(seconds)
    values = values[~np.isnan(values)] * 1000
    if not values.size:
        return None
    figures = {"mean": values.mean()}
    figures |= {f"p{percent}": np.percentile(values, percent) for percent in PERCENTILES}
    figures["max"] = values.max()
    return {name: round(float(value), 3) for name, value in figures.items()}


def _array(values: Iterable[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return values if isinstance(values, np.ndarray) else np.fromiter(values, np.float64)
