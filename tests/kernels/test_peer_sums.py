"""The exchange over peers' memory against its definition. On one device, the peers' pushes are made by hand,
or ranks are streams of one process."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.peer_sums.kernel import ABSENT, NUM_TURNS, SLICE, exchange
from engine.kernels.peer_sums.naive import naive_gather, naive_sum
from tests.kernels.hopper import compile_for_hopper

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
ROOM = 2 * SLICE


class Side:
    """Ranks side by side in one process, whose rooms are ordinary tensors."""

    def __init__(self, size: int) -> None:
        room = (NUM_TURNS, size, ROOM)
        self.rooms = [torch.full(room, ABSENT, dtype=torch.int16, device=DEVICE) for _ in range(size)]
        self.addresses = torch.tensor([each.data_ptr() for each in self.rooms], device=DEVICE)
        self.turns = [torch.zeros(ROOM // SLICE, dtype=torch.int32, device=DEVICE) for _ in range(size)]
        self.stop = torch.zeros(1, dtype=torch.int32, pin_memory=ON_GPU)

    def exchange(self, rank: int, part: torch.Tensor, out: torch.Tensor, *, gathers: bool) -> None:
        exchange(
            part,
            out,
            rooms=self.addresses,
            turns=self.turns[rank],
            stop=self.stop,
            room_elements=ROOM,
            rank=rank,
            gathers=gathers,
        )

    def push(self, source: int, target: int, part: torch.Tensor, turn: int) -> None:
        """What a rank's kernel pushes."""
        bits = torch.where(part == 0, torch.zeros_like(part), part).view(torch.int16)
        self.rooms[target][turn % NUM_TURNS, source, : len(part)] = bits


def numbers(count: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    drawn[::7] = -0.0
    return drawn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_every_turn_gives_the_sum_in_rank_order_whatever_the_sizes(size: int, dtype: torch.dtype) -> None:
    side, rank, used = Side(size), 1, [0, 0]
    for call, count in enumerate((5, ROOM, SLICE, SLICE + 3, 1, ROOM, 7)):
        parts = [numbers(count, 10 * call + source, dtype) for source in range(size)]
        for source in range(size):
            for number in range(2):  # each slice has turns of its own
                piece = parts[source][number * SLICE : (number + 1) * SLICE]
                if source != rank and len(piece):
                    bits = torch.where(piece == 0, torch.zeros_like(piece), piece).view(torch.int16)
                    begin = number * SLICE
                    room = side.rooms[rank][used[number] % NUM_TURNS, source]
                    room[begin : begin + len(piece)] = bits
        out = torch.empty_like(parts[rank])
        side.exchange(rank, parts[rank], out, gathers=False)
        if ON_GPU or dtype is torch.float16:
            assert torch.equal(out, naive_sum(parts)), call
        else:  # Triton's interpreter cuts numbers that are to be rounded to bfloat16
            torch.testing.assert_close(out, naive_sum(parts), rtol=2**-7, atol=0)
        used = [used[0] + 1, used[1] + (count > SLICE)]
        # The room of the turn before is as it was at first.
        cleared = side.rooms[rank][(used[0] - 2) % NUM_TURNS, :, :SLICE]
        assert bool((cleared == ABSENT).all())
    assert side.turns[rank].tolist() == used


def test_gathers_in_rank_order() -> None:
    side, parts = Side(2), [numbers(SLICE + 9, seed, torch.bfloat16) for seed in range(2)]
    side.push(0, 1, parts[0], turn=0)
    out = torch.empty(2, SLICE + 9, dtype=torch.bfloat16, device=DEVICE)
    side.exchange(1, parts[1], out, gathers=True)
    assert torch.equal(out, naive_gather(parts))


def test_what_a_rank_pushes_is_in_every_room() -> None:
    side, part = Side(2), numbers(20, 3, torch.bfloat16)
    side.push(1, 0, part, turn=0)
    side.exchange(0, part, torch.empty_like(part), gathers=False)
    expected = torch.where(part == 0, torch.zeros_like(part), part).view(torch.int16)
    for target in range(2):
        assert torch.equal(side.rooms[target][0, 0, :20], expected)


def test_a_wait_for_a_lost_rank_ends_when_the_host_says_so() -> None:
    side, part = Side(2), numbers(20, 3, torch.bfloat16)
    side.stop.fill_(1)
    side.exchange(0, part, torch.empty_like(part), gathers=False)
    if ON_GPU:
        torch.cuda.synchronize()


@pytest.mark.gpu
def test_ranks_that_run_at_once_get_the_same_bits() -> None:
    """Two streams of one device, hundreds of turns, in graphs too."""
    side, streams = Side(2), [torch.cuda.Stream() for _ in range(2)]
    parts = [numbers(ROOM, seed, torch.bfloat16) for seed in range(2)]
    outs = [torch.empty_like(part) for part in parts]
    expected = naive_sum(parts)
    torch.cuda.synchronize()

    def both(times: int) -> None:
        for _ in range(times):
            for rank, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    side.exchange(rank, parts[rank], outs[rank], gathers=False)

    both(1)
    torch.cuda.synchronize()
    graphs = []
    for rank in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="relaxed"):
            side.exchange(rank, parts[rank], outs[rank], gathers=False)
        graphs.append(graph)
    both(100)
    for _ in range(100):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for out in outs:
        assert torch.equal(out, expected)
    assert not side.stop.any()


def test_compiles_for_hopper() -> None:
    for gathers in (False, True):
        sizes = compile_for_hopper(
            "engine.kernels.peer_sums.kernel:exchange_kernel",
            {
                "part": "*bf16",
                "out": "*bf16",
                "rooms": "*i64",
                "turns": "*i32",
                "stop": "*i32",
                "num_elements": "i32",
                "room_elements": "i32",
            },
            {
                "RANK": 1,
                "SIZE": 2,
                "GATHERS": gathers,
                "SLICE": SLICE,
                "READS": 256,
                "MOST_LOOKS": 1 << 20,
                "OVERLAP": True,
            },
            num_warps=4,
        )
        assert sizes["waits"] == 1
        assert not sizes["early_writes"]
