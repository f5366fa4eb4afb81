"""A worker's place among the ranks that share one model by splitting its matrices (tensor parallelism)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.parallel.communicator import Communicator

# Plain features that do not divide are split in units of so many, if that is possible: rows of a matrix then
# begin where wide loads may.
_LARGEST_UNIT = 64


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
class HeadShare:
    """The attention heads of one rank: whole groups of query heads with the key-value heads that they read.

    Attributes:
        heads, kv_heads: this rank's. Where there are more ranks than key-value heads, several ranks have the
            same one, and some of its query heads each.
        kv_replicas: how many ranks have each of the key-value heads.
    """

    heads: FeatureRange
    kv_heads: FeatureRange
    kv_replicas: int


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """This rank and how it adds up with the others. The default is one rank that holds everything.

    Attributes:
        rank, size: place and number of ranks.
        communicator: the way to the others; needed only where size > 1, and not to load weights.
        block: features that are split together where that is possible: those that quantized weights keep in
            one block or group.
    """

    rank: int = 0
    size: int = 1
    communicator: Communicator | None = None
    block: int = 1

    def part(self, total: int, what: str) -> FeatureRange:
        """The features that this rank holds of `total`. Where they do not divide, the first ranks have more.

        Raises:
            SplitError: there are fewer than ranks.
        """
        return self.parts(total, what)[self.rank]

    def parts(self, total: int, what: str) -> list[FeatureRange]:
        """What each rank holds of `total`: equal parts if they are whole blocks, or else some that differ by
        one block. Raises as `part`.
        """
        if total < self.size:
            raise SplitError(f"{what} is {total}, which {self.size} tensor-parallel ranks cannot share")
        unit = self.block
        if total % self.size == 0 and total // self.size % unit == 0:
            unit = total // self.size
        else:
            units = (1 << power for power in range(max(unit, _LARGEST_UNIT).bit_length() - 1, -1, -1))
            unit = next(each for each in units if total % each == 0 and total // each >= self.size)
        each, more = divmod(total // unit, self.size)
        parts, first = [], 0
        for rank in range(self.size):
            size = (each + (rank < more)) * unit
            parts.append(FeatureRange(first, size, total))
            first += size
        return parts

    def share_heads(self, num_heads: int, num_kv_heads: int) -> HeadShare:
        """This rank's heads.

        Raises:
            SplitError: there are fewer key-value heads than ranks, and ranks do not divide among them; or
                fewer heads than ranks.
        """
        group = num_heads // num_kv_heads
        if num_kv_heads >= self.size:
            own = TensorParallel(self.rank, self.size).part(num_kv_heads, "num_key_value_heads")
            heads = FeatureRange(own.first * group, own.size * group, num_heads)
            return HeadShare(heads, own, 1)
        if self.size % num_kv_heads:
            raise SplitError(
                f"num_key_value_heads is {num_kv_heads}, fewer than ranks, and does not divide their number"
            )
        replicas = self.size // num_kv_heads
        kv_head, place = divmod(self.rank, replicas)
        of_group = TensorParallel(place, replicas).part(group, "the number of heads for a key-value head")
        heads = FeatureRange(kv_head * group + of_group.first, of_group.size, num_heads)
        return HeadShare(heads, FeatureRange(kv_head, 1, num_kv_heads), replicas)

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's partial result; in place where there are several ranks."""
        if self.size == 1:
            return partial
        assert self.communicator is not None
        return self.communicator.all_reduce(partial)

    def all_gather_last_dim(self, part: torch.Tensor, parts: Sequence[FeatureRange]) -> torch.Tensor:
        """Every rank's [..., n] side by side, [..., total], in rank order. The bytes are the same on every
        rank, so that all of them sample the same tokens from gathered logits: the sampler is a function of a
        row's logits, its seed and its position.

        Args:
            parts: which of the features each rank has.
        """
        if self.size == 1:
            return part
        assert self.communicator is not None
        widest = max(each.size for each in parts)
        if part.shape[-1] < widest:
            part = F.pad(part, (0, widest - part.shape[-1]))
        gathered = self.communicator.all_gather(part)
        return torch.cat(
            [whole[..., : each.size] for whole, each in zip(gathered, parts, strict=True)], dim=-1
        )

    def of_rank(self, rank: int) -> TensorParallel:
        """Another rank as it sees itself, for what it holds."""
        return TensorParallel(rank, self.size, None, self.block)
