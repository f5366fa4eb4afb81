"""What goes to the device in one copy arrives whole, however much it is and whatever goes after it."""

from __future__ import annotations

import numpy as np
import torch

from engine.cuda.staging import Staging

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_TURNS = 2
# What the device has to do before each copy: some 10 ms, in which the host would send everything.
BUSY_CYCLES = 20_000_000


class Steps:
    """As a runner has it: the device is behind, and a buffer comes round again only after the result of the
    step that took it was read.
    """

    def __init__(self) -> None:
        self._ends: list[torch.cuda.Event] = []

    def begin(self) -> None:
        if DEVICE.type != "cuda":
            return
        if len(self._ends) >= NUM_TURNS:
            self._ends[-NUM_TURNS].synchronize()
        torch.cuda._sleep(BUSY_CYCLES)

    def end(self) -> None:
        if DEVICE.type == "cuda":
            self._ends.append(torch.cuda.Event())
            self._ends[-1].record()


def test_arrays_arrive_as_they_left_before_the_next_ones_are_copied() -> None:
    staging, steps = Staging(NUM_TURNS, DEVICE), Steps()
    rng = np.random.default_rng(0)
    sent, arrived = [], []
    for size in (3, 0, 40_000, 7, 100_000, 1):
        arrays = [
            rng.integers(-9, 9, size).astype(np.int32),
            rng.standard_normal(5).astype(np.float32),
            np.zeros(0, dtype=np.float32),
        ]
        sent += arrays
        steps.begin()
        # Copied on the device behind the copy to it, with nothing to wait for in between.
        arrived += [array.clone() for array in staging.send(arrays)]
        steps.end()
    for before, after in zip(sent, arrived, strict=True):
        assert after.cpu().numpy().dtype == before.dtype
        assert (after.cpu().numpy() == before).all()
