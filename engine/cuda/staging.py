"""Copies the small arrays of a step to the device, all in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.dispatch.control import MAX_STEPS_IN_FLIGHT

# The number of buffers that steps use in turns. A buffer is rewritten only after the result of the step that
# used it was read, so two more than there are steps in flight are enough.
NUM_TURNS = MAX_STEPS_IN_FLIGHT + 2
# Enough for a batch of ordinary requests; buffers grow for very long lists of tokens.
_WORDS = 1 << 14


class Staging:
    """Pinned host buffers that steps use in turns, and one buffer on the device.

    A host buffer is rewritten only `num_turns` steps later, when its copy is over. One device buffer is
    enough, because copies and the kernels that read it run in order on the same stream.
    """

    def __init__(self, num_turns: int, device: torch.device) -> None:
        self._turn = 0
        self._host = [self._pinned(_WORDS, device) for _ in range(num_turns)]
        self._device = torch.zeros(_WORDS, dtype=torch.int32, device=device)

    @staticmethod
    def _pinned(num_words: int, device: torch.device) -> torch.Tensor:
        return torch.zeros(num_words, dtype=torch.int32, pin_memory=device.type == "cuda")

    def send(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Starts the copy of flat arrays, each int32 or fp32. Returns them on the device, valid until the
        next call."""
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
