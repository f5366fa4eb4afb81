"""A worker's place among the ranks that share one model by splitting its matrices (tensor parallelism)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.parallel.communicator import Communicator


class SplitError(ValueError):
    """A matrix cannot be split over ranks, or fused with others, as the layer or its number format needs."""


@dataclass(frozen=True, slots=True)
class FeatureRange:
    """The features that a rank holds of a checkpoint matrix: `size` of them from `first` on, of `total`."""

    first: int
    size: int
    total: int

    @staticmethod
    def whole(total: int) -> FeatureRange:
        """All of them."""
        return FeatureRange(0, total, total)


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """This rank and how it adds up with the others. The default is one rank that holds everything.

    Attributes:
        rank, size: place and number of ranks.
        communicator: the way to the others; needed only where size > 1, and not to load weights.
    """

    rank: int = 0
    size: int = 1
    communicator: Communicator | None = None

    def split(self, total: int, what: str) -> int:
        """This rank's share of `total`.

        Raises:
            SplitError: it does not divide evenly.
        """
        if total % self.size:
            raise SplitError(
                f"{what} is {total}, which {self.size} tensor-parallel ranks cannot share evenly"
            )
        return total // self.size

    def part(self, total: int, what: str) -> FeatureRange:
        """The features that this rank holds of `total`. Raises as `split`."""
        size = self.split(total, what)
        return FeatureRange(self.rank * size, size, total)

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's partial result; in place where there are several ranks."""
        if self.size == 1:
            return partial
        assert self.communicator is not None
        return self.communicator.all_reduce(partial)

    def all_gather_last_dim(self, part: torch.Tensor) -> torch.Tensor:
        """Every rank's [..., n] side by side: [..., size * n], in rank order. The bytes are the same on every
        rank, so that all of them sample the same tokens from gathered logits: the sampler is a function of a
        row's logits, its seed and its position.
        """
        if self.size == 1:
            return part
        assert self.communicator is not None
        return torch.cat(self.communicator.all_gather(part), dim=-1)
