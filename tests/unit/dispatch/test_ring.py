"""The shared-memory ring: order, back-pressure, limits, and nothing left in /dev/shm."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.dispatch.ring import (
    Ring,
    RingError,
    RingMemoryError,
    RingReader,
    RingShape,
    RingWriter,
    remove_orphans,
)


@pytest.fixture
def ring() -> Iterator[Ring]:
    ring = Ring.create(RingShape(slot_bytes=100, num_slots=3, num_readers=2))
    yield ring
    ring.unlink()
    ring.close()


@given(st.lists(st.one_of(st.binary(max_size=40), st.integers(0, 1)), max_size=60))
def test_every_reader_sees_every_record_in_order_and_a_full_ring_refuses(actions: list[bytes | int]) -> None:
    ring = Ring.create(RingShape(slot_bytes=40, num_slots=3, num_readers=2))
    ring.unlink()
    writer, readers = RingWriter(ring), [RingReader(ring, 0), RingReader(ring, 1)]
    unread: list[deque[bytes]] = [deque(), deque()]
    for action in actions:
        if isinstance(action, int):
            expected = unread[action].popleft() if unread[action] else None
            assert readers[action].read() == expected
        elif max(map(len, unread)) == 3:
            with pytest.raises(RingError, match="full"):
                writer.write(action)
        else:
            writer.write(action)
            for queue in unread:
                queue.append(action)
    del writer, readers
    ring.close()


def test_a_record_larger_than_a_slot_is_refused_before_it_is_written(ring: Ring) -> None:
    writer, reader = RingWriter(ring), RingReader(ring, 0)
    writer.write(b"x" * 100)
    with pytest.raises(RingError, match="does not fit"):
        writer.write(b"y" * 101)
    assert reader.read() == b"x" * 100
    assert reader.read() is None


def test_a_slot_takes_the_memory_of_the_records_that_were_in_it() -> None:
    ring = Ring.create(RingShape(slot_bytes=1 << 24, num_slots=4))

    def taken() -> int:
        return os.stat(f"/dev/shm/{ring.name}").st_blocks * 512

    try:
        assert taken() <= 5 * (1 << 16)
        writer, reader = RingWriter(ring), RingReader(ring)
        for size in [100] * 9:
            writer.write(b"x" * size)
            assert reader.read() == b"x" * size
        assert taken() <= 5 * (1 << 16)
        writer.write(b"y" * (1 << 24))
        assert reader.read() == b"y" * (1 << 24)
        assert 1 << 24 <= taken() <= (1 << 24) + 5 * (1 << 16)
    finally:
        ring.unlink()
        ring.close()


def test_no_memory_for_a_large_record_is_an_error_and_small_ones_still_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    ring = Ring.create(RingShape(slot_bytes=1 << 20, num_slots=2))
    ring.unlink()
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    writer, reader = RingWriter(ring), RingReader(ring)
    with pytest.raises(RingMemoryError, match=r"no memory in /dev/shm for a record of .*No space left"):
        writer.write(b"x" * (1 << 17))
    assert reader.read() is None
    writer.write(b"y")
    assert reader.read() == b"y"
    del writer, reader
    ring.close()


def test_the_other_side_maps_it_by_name_and_sees_the_same_records(ring: Ring) -> None:
    other = Ring.open(ring.name)
    assert other.shape == ring.shape
    RingWriter(ring).write(b"hello")
    assert RingReader(other, 1).read() == b"hello"
    other.close()


def test_segments_are_private_and_gone_once_unlinked(ring: Ring) -> None:
    path = Path("/dev/shm") / ring.name
    assert path.stat().st_mode & 0o777 == 0o600
    ring.unlink()
    assert not path.exists()
    RingWriter(ring).write(b"still mapped")


@pytest.mark.parametrize("name", ["", "../etc/passwd", "pagewire-1-zz", "pagewire-1-" + "0" * 16 + "/x"])
def test_a_name_that_is_no_rings_is_refused(name: str) -> None:
    with pytest.raises(RingError, match="not the name"):
        Ring.open(name)


@pytest.mark.parametrize("word", range(5))
def test_a_damaged_header_is_refused(ring: Ring, word: int) -> None:
    ring._words[word] += 1000
    with pytest.raises(RingError):
        Ring.open(ring.name)


def test_an_impossible_cursor_or_length_is_noticed_by_the_reader(ring: Ring) -> None:
    reader = RingReader(ring, 0)
    ring._words[8] = 77
    with pytest.raises(RingError, match="ahead"):
        reader.read()
    ring._words[8] = 1
    ring._bytes[4096:4104] = (101).to_bytes(8, "little")
    with pytest.raises(RingError, match="claims"):
        reader.read()


def test_only_segments_of_dead_processes_are_removed_as_orphans(ring: Ring) -> None:
    child = "from engine.dispatch.ring import *; print(Ring.create(RingShape(8, 1)).name)"
    name = subprocess.run(
        [sys.executable, "-c", child], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert (Path("/dev/shm") / name).exists()
    assert name in remove_orphans()
    assert not (Path("/dev/shm") / name).exists()
    assert (Path("/dev/shm") / ring.name).exists()
    assert f"-{os.getpid()}-" in ring.name


def test_a_segment_of_a_process_that_cannot_be_seen_from_here_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As of one in another container: its number means nothing here, or somebody else."""
    nobody = int(Path("/proc/sys/kernel/pid_max").read_text()) + 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: nobody)
        ring = Ring.create(RingShape(slot_bytes=8, num_slots=1))
    assert f"-{nobody}-" in ring.name
    assert ring.name not in remove_orphans()
    assert (Path("/dev/shm") / ring.name).exists()
    ring.close()
    assert ring.name in remove_orphans()
