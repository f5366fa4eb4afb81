"""Sums of small tensors over the GPUs of a host in one launch each: see engine/kernels/peer_sums.

NCCL takes a dozen microseconds for a token's hidden state between two NVLink neighbours, where the way there
and back takes two. Rooms and the table of addresses stay where they are.
"""

from __future__ import annotations

import torch

from engine.cuda.peer_memory import PeerMemory
from engine.kernels.peer_sums.kernel import ABSENT, NUM_TURNS, SLICE, exchange

# Ranks -> bytes up to which one launch is faster than NCCL. It sends everything to everybody, which is what
# any algorithm must do for two ranks and more than it must for more.
MOST_BYTES = {2: 4 << 20, 3: 1 << 20, 4: 512 << 10, 5: 256 << 10, 6: 256 << 10, 7: 256 << 10, 8: 256 << 10}
_DTYPES = (torch.bfloat16, torch.float16)


def can_exchange(size: int) -> bool:
    """Whether so many ranks may use it."""
    return size in MOST_BYTES


class PeerSums:
    """One rank's rooms and its way into those of others. Implements engine.parallel.exchange.PeerExchange.

    Args:
        rank, size: its place among those that add up.
        device: the current one.
        most_bytes: of a tensor; by default what was measured.

    Raises:
        OSError: there is no memory for the rooms.
    """

    def __init__(self, rank: int, size: int, device: torch.device, most_bytes: int | None = None) -> None:
        self._rank, self._size, self._device = rank, size, device
        most = MOST_BYTES[size] if most_bytes is None else most_bytes
        self._room_elements = -(-most // (2 * SLICE)) * SLICE
        torch.cuda.current_stream(device).synchronize()  # the device's context exists, and is current
        self._memory = PeerMemory(NUM_TURNS * size * self._room_elements * 2)
        self._rooms = torch.zeros(size, dtype=torch.int64, device=device)
        self._turns = torch.zeros(self._room_elements // SLICE, dtype=torch.int32, device=device)
        self._stop = torch.zeros(1, dtype=torch.int32, pin_memory=True)

    def address(self) -> bytes:
        """See PeerExchange."""
        return self._memory.handle()

    @property
    def device_id(self) -> str:
        """The GPU's UUID."""
        return str(torch.cuda.get_device_properties(self._device).uuid)

    def open(self, addresses: list[bytes]) -> None:
        """See PeerExchange."""
        self._memory.close_opened()
        self._memory.fill(ABSENT & 0xFFFF)
        own = self._memory.address
        rooms = [
            own if rank == self._rank else self._memory.open(handle) for rank, handle in enumerate(addresses)
        ]
        self._rooms.copy_(torch.tensor(rooms, dtype=torch.int64))
        self._turns.zero_()
        self._stop.zero_()
        torch.cuda.synchronize(self._device)

    def takes(self, tensor: torch.Tensor, *, is_only_way: bool) -> bool:
        """See PeerExchange."""
        fits = 0 < tensor.numel() <= self._room_elements
        return tensor.dtype in _DTYPES and tensor.is_contiguous() and (fits or is_only_way)

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """See PeerExchange."""
        for part in torch.split(partial.view(-1), self._room_elements):
            self._exchange(part, part, gathers=False)
        return partial

    def all_gather(self, part: torch.Tensor) -> list[torch.Tensor]:
        """See PeerExchange. Negative zeros become positive."""
        pieces = torch.split(part.view(-1), self._room_elements)
        gathered = [piece.new_empty(self._size, piece.numel()) for piece in pieces]
        for piece, out in zip(pieces, gathered, strict=True):
            self._exchange(piece, out, gathers=True)
        whole = gathered[0] if len(gathered) == 1 else torch.cat(gathered, dim=1)
        return [row.view(part.shape) for row in whole]

    def _exchange(self, part: torch.Tensor, out: torch.Tensor, *, gathers: bool) -> None:
        exchange(
            part,
            out,
            rooms=self._rooms,
            turns=self._turns,
            stop=self._stop,
            room_elements=self._room_elements,
            rank=self._rank,
            gathers=gathers,
        )

    @property
    def has_given_up(self) -> bool:
        """See PeerExchange."""
        return int(self._stop[0]) == 2

    def stop(self) -> None:
        """See PeerExchange."""
        self._stop.fill_(1)

    def close(self) -> None:
        """See PeerExchange."""
        self._memory.close_opened()
