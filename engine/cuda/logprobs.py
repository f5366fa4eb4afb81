"""Device and host memory for the log probabilities of a step's tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.attention.interface import IntArray
from engine.dispatch.records import TokenLogprobs
from engine.kernels.sampling.logprobs import MAX_TOP, Logprobs


class LogprobsBuffers:
    """Memory for log probabilities that steps use in turns, on the device and pinned on the host."""

    def __init__(self, num_turns: int, max_rows: int, device: torch.device) -> None:
        self._turn = 0
        shape = (num_turns, _num_words(max_rows))
        self._device = torch.zeros(shape, dtype=torch.int32, device=device)
        self._host = torch.zeros(shape, dtype=torch.int32, pin_memory=device.type == "cuda")

    def take(self, index: IntArray, num_top: IntArray) -> LogprobsRequest:
        """Memory for a step's log probabilities; see LogprobsRequest for the arguments."""
        self._turn = (self._turn + 1) % len(self._device)
        words = slice(_num_words(len(index)))
        return LogprobsRequest(index, num_top, self._device[self._turn, words], self._host[self._turn, words])


@dataclass(frozen=True, slots=True)
class LogprobsRequest:
    """The log probabilities requested of one step.

    Attributes:
        index: indices of the tokens in the result, [L].
        num_top: number of top entries of each, [L].
    """

    index: IntArray
    num_top: IntArray
    _device: torch.Tensor
    _host: torch.Tensor

    @property
    def out(self) -> Logprobs:
        """The device arrays that `gather_logprobs` writes."""
        return _parts(self._device, len(self.index))

    def to_host(self) -> None:
        """Starts the copy to the host, on the current stream."""
        self._host.copy_(self._device, non_blocking=True)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Copies of (the tokens' log probabilities [L], top ids [L, MAX_TOP], the top ids' log probabilities
        [L, MAX_TOP]). Call it after the copy to the host is over."""
        parts = _parts(self._host, len(self.index))
        sampled, values = parts.sampled.numpy().copy(), parts.top_logprobs.numpy().copy()
        return sampled, parts.top_ids.numpy().astype("u4"), values

    def by_index(self) -> dict[int, TokenLogprobs]:
        """The `logprobs` of a step's result. Call it after the copy to the host is over."""
        parts = _parts(self._host, len(self.index))
        sampled, values = parts.sampled.numpy(), parts.top_logprobs.numpy().copy()
        top_ids = parts.top_ids.numpy().astype("u4")
        return {
            int(index): TokenLogprobs(float(sampled[i]), top_ids[i, :count], values[i, :count])
            for i, (index, count) in enumerate(zip(self.index, self.num_top, strict=True))
        }


def _aligned(num_rows: int) -> int:
    """Words of a column of `num_rows`, rounded up so that the next array is aligned to 16 bytes."""
    return -(-num_rows // 4) * 4


def _num_words(num_rows: int) -> int:
    return _aligned(num_rows) + 2 * num_rows * MAX_TOP


def _parts(words: torch.Tensor, num_rows: int) -> Logprobs:
    """Views of the arrays in `words`."""
    top = words[_aligned(num_rows) :].view(2, num_rows, MAX_TOP)
    return Logprobs(words[:num_rows].view(torch.float32), top[0], top[1].view(torch.float32))
