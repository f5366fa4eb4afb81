"""Sums over ranks by other means than a library's, where a device has such: see engine/cuda/peer_sums.py."""

from __future__ import annotations

from typing import Protocol

import torch


class PeerExchange(Protocol):
    """How the ranks of one host write into each other's memory. Used by the thread that launches, but for
    `stop`."""

    def address(self) -> bytes:
        """What others need to reach this rank's memory."""

    @property
    def device_id(self) -> str:
        """Which device it is on."""

    def open(self, addresses: list[bytes]) -> None:
        """Reaches the others' memory and empties this rank's own. No rank exchanges before all have done so,
        nor opens before all have stopped.

        Raises:
            OSError: the devices cannot reach each other.
        """

    def takes(self, tensor: torch.Tensor, *, is_only_way: bool) -> bool:
        """Whether it can sum and gather such a tensor, and is faster at it than others, if there are any."""

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place; the same bits on every rank."""

    def all_gather(self, part: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's part, in rank order."""

    @property
    def has_given_up(self) -> bool:
        """Whether a wait for another rank went on for so long that the device ended it."""

    def stop(self) -> None:
        """Ends all waits for others, now and until `open`; from any thread."""

    def close(self) -> None:
        """Lets go of the others' memory; this rank's own stays."""
