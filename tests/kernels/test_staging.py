"""What goes to the device in one copy arrives whole, however much it is and whatever goes after it."""

from __future__ import annotations

import numpy as np
import torch

from engine.cuda.staging import Staging

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_arrays_arrive_as_they_left_before_the_next_ones_are_copied() -> None:
    staging = Staging(2, DEVICE)
    rng = np.random.default_rng(0)
    sent, arrived = [], []
    for size in (3, 0, 40_000, 7, 100_000, 1):
        arrays = [
            rng.integers(-9, 9, size).astype(np.int32),
            rng.standard_normal(5).astype(np.float32),
            np.zeros(0, dtype=np.float32),
        ]
        sent += arrays
        # Copied on the device behind the copy to it, with nothing to wait for in between.
        arrived += [array.clone() for array in staging.send(arrays)]
    for before, after in zip(sent, arrived, strict=True):
        assert after.cpu().numpy().dtype == before.dtype
        assert (after.cpu().numpy() == before).all()
