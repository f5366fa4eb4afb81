"""Small arrays of a step on their way to the device: whatever their number, one copy carries them all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.dispatch.control import MAX_STEPS_IN_FLIGHT

# Buffers that steps take in turns: one is written again only after the result of the step that took it was
# read, so that two more than can be in flight are plenty.
NUM_TURNS = MAX_STEPS_IN_FLIGHT + 2
# Enough for a batch of common requests; the longest lists of tokens take more.
_WORDS = 1 << 14


class Staging:
    """Pinned memory that steps take in turns, and its image on the device.

    A buffer is written again only `num_turns` steps later, when its copy has long been made. On the device
    there is one image: work launched on the same stream has read it before the next copy reaches it.
    """

    def __init__(self, num_turns: int, device: torch.device) -> None:
        self._turn = 0
        self._host = [self._pinned(_WORDS, device) for _ in range(num_turns)]
        self._device = torch.zeros(_WORDS, dtype=torch.int32, device=device)

    @staticmethod
    def _pinned(num_words: int, device: torch.device) -> torch.Tensor:
        return torch.zeros(num_words, dtype=torch.int32, pin_memory=device.type == "cuda")

    def send(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Starts the copy of flat arrays, each int32 or fp32; on the device they last until the next call."""
        sizes = [len(array) for array in arrays]
        total = sum(sizes)
        self._turn = (self._turn + 1) % len(self._host)
        if total > len(self._host[self._turn]):
            self._host[self._turn] = self._pinned(2 * total, self._device.device)
        if total > len(self._device):
            self._device = torch.zeros(2 * total, dtype=torch.int32, device=self._device.device)
        staged, image = self._host[self._turn][:total], self._device[:total]
        np.concatenate([array.view(np.int32) for array in arrays], out=staged.numpy())
        image.copy_(staged, non_blocking=True)
        return [
            part.view(torch.float32) if array.dtype == np.float32 else part
            for array, part in zip(arrays, torch.split(image, sizes), strict=True)
        ]
