"""One launch in which every rank gives its numbers to all others and takes theirs.

Each rank has rooms in its memory that the others can write to. A program pushes its slice of the rank's
numbers into every rank's room, then reads its own rooms until all numbers are there, and adds them up in rank
order, so that all ranks get the same bits. There is no flag and no barrier: a number is there when it is
something else than -0.0, with which rooms are filled (negative zeros are pushed as positive ones). This is
the protocol that TensorRT-LLM and FlashInfer call Lamport's.

Rooms are used in turns of three. While a rank reads the room of one turn, others may be one turn ahead and
write to the next room, but no further: for that they need what this rank pushes in the next turn. So nobody
touches the room of the turn before, and it is cleared meanwhile. A slice always belongs to the same program
and counts its turns itself, so that calls of any sizes can follow each other, and graphs can be replayed.

A program waits no longer than the host lets it: the host sets `stop` once the others are lost. What is read
then means nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from engine.kernels.launch import overlap_options, wait_for_previous

if TYPE_CHECKING:
    import torch

NUM_TURNS = 3
# Numbers of a program's slice.
SLICE = 1024
# -0.0 of 16 bits: "not there yet".
ABSENT = -(1 << 15)
# Reads between two looks at `stop`, which lies in the host's memory.
_READS = 256
# Looks after which a program gives up by itself: some minutes. The host, which should have stopped it long
# before, finds `stop` set then.
_MOST_LOOKS = 1 << 20


@triton.jit(do_not_specialize=["num_elements", "room_elements"])
def exchange_kernel(
    part,  # [num_elements], 16 bits each
    out,  # [num_elements], or [SIZE, num_elements] where it gathers
    rooms,  # [SIZE] int64: the address of each rank's rooms, [NUM_TURNS, SIZE, room_elements]
    turns,  # [slices] int32: how often each slice was exchanged
    stop,  # [1] int32 in the host's memory
    num_elements,
    room_elements,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    GATHERS: tl.constexpr,
    SLICE: tl.constexpr,
    READS: tl.constexpr,
    MOST_LOOKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program p exchanges slice p."""
    wait_for_previous(OVERLAP)
    slice_number = tl.program_id(0)
    offsets = slice_number * SLICE + tl.arange(0, SLICE)
    mask = offsets < num_elements
    turn = tl.load(turns + slice_number)
    bits = tl.load(part + offsets, mask=mask, other=0.0).to(tl.int16, bitcast=True)
    bits = tl.where(bits == -32768, tl.zeros_like(bits), bits)
    room = (turn % 3) * SIZE
    for peer in tl.static_range(SIZE):
        theirs = tl.load(rooms + peer).to(tl.pointer_type(tl.int16))
        tl.store(theirs + (room + RANK).to(tl.int64) * room_elements + offsets, bits, mask=mask)
    own = tl.load(rooms + RANK).to(tl.pointer_type(tl.int16))
    room_before = ((turn + 2) % 3) * SIZE
    absent = tl.full([SLICE], -32768, tl.int16)
    total = tl.zeros([SLICE], tl.float32)
    for source in tl.static_range(SIZE):
        tl.store(own + (room_before + source).to(tl.int64) * room_elements + offsets, absent)
    for source in tl.static_range(SIZE):
        place = own + (room + source).to(tl.int64) * room_elements + offsets
        found = tl.load(place, mask=mask, other=0, volatile=True)
        missing = tl.max((found == -32768).to(tl.int32), axis=0)
        reads = 0
        while missing != 0:
            found = tl.load(place, mask=mask, other=0, volatile=True)
            missing = tl.max((found == -32768).to(tl.int32), axis=0)
            reads += 1
            if reads % READS == 0:
                if tl.load(stop, volatile=True) != 0:
                    missing = 0
                if reads >= READS * MOST_LOOKS:
                    tl.store(stop, 2)
                    missing = 0
        numbers = found.to(part.dtype.element_ty, bitcast=True)
        if GATHERS:
            tl.store(out + source * num_elements.to(tl.int64) + offsets, numbers, mask=mask)
        else:
            total += numbers.to(tl.float32)
    if not GATHERS:
        tl.store(out + offsets, total.to(part.dtype.element_ty), mask=mask)
    tl.store(turns + slice_number, turn + 1)


def exchange(
    part: torch.Tensor,
    out: torch.Tensor,
    *,
    rooms: torch.Tensor,
    turns: torch.Tensor,
    stop: torch.Tensor,
    room_elements: int,
    rank: int,
    gathers: bool,
) -> None:
    """Puts the sum of all ranks' `part` in `out`, or each of them.

    Args:
        part: contiguous, of 16-bit numbers, no more than `room_elements`.
        out: as `part`, which it may be; of a gather [size, number of elements].
        rooms: int64 [size]: addresses in this process of each rank's rooms.
        turns: int32, one for each slice of a room; this rank's alone.
        stop: int32 [1], pinned. Set by the host to end all waits; by the kernel once it gives up.
        room_elements: a multiple of SLICE.
    """
    num_elements = part.numel()
    exchange_kernel[(triton.cdiv(num_elements, SLICE),)](
        part,
        out,
        rooms,
        turns,
        stop,
        num_elements,
        room_elements,
        RANK=rank,
        SIZE=rooms.shape[0],
        GATHERS=gathers,
        SLICE=SLICE,
        READS=_READS,
        MOST_LOOKS=_MOST_LOOKS,
        num_warps=4,
        **overlap_options(),
    )
