"""Random numbers that depend on nothing but a request's seed and the position of the token drawn.

The generator is SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA
2014). Its n-th output is mix(state + n * GAMMA), so that it can be entered at any n without drawing the
numbers before. The state is mix(seed + GAMMA), which keeps neighbouring seeds apart; n is the position + 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def mix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's output function, a bijection of 64-bit integers."""
    x = (x ^ (x >> _SHIFTS[0])) * _MULTIPLIERS[0]
    x = (x ^ (x >> _SHIFTS[1])) * _MULTIPLIERS[1]
    return x ^ (x >> _SHIFTS[2])


def uniforms(seeds: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """One number for each (seed, position), uniform over multiples of 2^-53 inside (0, 1).

    Args:
        seeds: of the requests, [S].
        positions: in its sequence, of the token each request is about to sample, [S].
    """
    state = mix64(seeds.astype(np.uint64) + GAMMA)
    bits = mix64(state + (positions.astype(np.uint64) + np.uint64(1)) * GAMMA)
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
