"""A ring of fixed-size slots in shared memory: one writer, one cursor for every reader.

Layout, in 8-byte little-endian words: a header page (magic, version, slot size, number of slots, number of
readers; the write cursor and each read cursor on a cache line of its own), then the slots, each a word
holding the record's length followed by the record. Cursors count records ever written or read, so
`write - read` is what a reader still has to see.

Ownership: the writer alone advances the write cursor, each reader alone its own. A slot may be overwritten
once every reader has moved past it; a reader copies a record out before it moves on.

Slots are as large as the largest record could be, and few records are large: the beginning of each slot is
reserved when the ring is made, more of it by the writer when a record needs it. Where no memory is left that
is an error, not a signal.

Waking the other side is not the ring's business: an eventfd is signalled after each write (signals.py). It
is also what orders memory. The writer stores the record, then the cursor, then adds one to the eventfd; the
kernel does that, and takes the count, under the eventfd's own lock. So a reader that has taken the signal of
a record sees all of the record, also on a processor that reorders stores, where a cursor that has moved says
only that a record is on its way. The way back needs no more: a slot is written again a whole ring later, and
by then its reader has signalled a result that came after its read.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import secrets
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_MAGIC = 0x7061676577697265  # "pagewire"
_RING_VERSION = 1
_HEADER_BYTES = 4096
_LINE_WORDS = 8
_WRITE_CURSOR = _LINE_WORDS
_READ_CURSORS = 2 * _LINE_WORDS
MAX_READERS = 32
MAX_SEGMENT_BYTES = 1 << 32

_LENGTH = struct.Struct("<Q")
# What is reserved of a slot at first.
_RESERVED = 1 << 16

_SHM = Path("/dev/shm")  # nosec B108 # names cannot be guessed, and are never opened if they exist
_PREFIX = "pagewire"
_NAME = re.compile(rf"{_PREFIX}-(\d+)-[0-9a-f]{{16}}")


class RingError(RuntimeError):
    """A segment is not a ring of this version, or a record does not fit."""


class RingMemoryError(RingError):
    """There is no shared memory left for a large record."""


@dataclass(frozen=True, slots=True)
class RingShape:
    """Size of a ring.

    Attributes:
        slot_bytes: the largest record.
        num_slots: records that may be written before the slowest reader has read one.
        num_readers: read cursors.
    """

    slot_bytes: int
    num_slots: int
    num_readers: int = 1

    def __post_init__(self) -> None:
        if min(self.slot_bytes, self.num_slots) <= 0 or not 0 < self.num_readers <= MAX_READERS:
            raise RingError(f"impossible ring shape {self}")
        if self.segment_bytes > MAX_SEGMENT_BYTES:
            raise RingError(f"a ring of {self.segment_bytes} bytes is over the limit of {MAX_SEGMENT_BYTES}")

    @property
    def stride(self) -> int:
        """Bytes from one slot to the next: length word plus record, in whole cache lines."""
        return (8 + self.slot_bytes + 63) // 64 * 64

    @property
    def segment_bytes(self) -> int:
        """Bytes of the whole segment."""
        return _HEADER_BYTES + self.num_slots * self.stride


class Ring:
    """A mapped ring segment. Close it to unmap; the memory goes when the last side has.

    Takes the file descriptor over.
    """

    def __init__(self, fd: int, mapping: mmap.mmap, shape: RingShape, name: str) -> None:
        self.shape = shape
        self.name = name
        self._fd = fd
        self._stride = shape.stride
        self._mapping = mapping
        self._bytes = memoryview(mapping)
        self._words = self._bytes[:_HEADER_BYTES].cast("Q")

    @classmethod
    def create(cls, shape: RingShape) -> Ring:
        """Creates a segment under a fresh name, mode 0600. The creator unlinks it once all have mapped it."""
        name, fd = _create_segment()
        try:
            os.ftruncate(fd, shape.segment_bytes)
            for start in (0, *(_HEADER_BYTES + i * shape.stride for i in range(shape.num_slots))):
                os.posix_fallocate(fd, start, min(_RESERVED, shape.segment_bytes - start))
            ring = cls(fd, mmap.mmap(fd, shape.segment_bytes), shape, name)
        except BaseException:
            os.close(fd)
            os.unlink(_SHM / name)
            raise
        header = (_MAGIC, _RING_VERSION, shape.slot_bytes, shape.num_slots, shape.num_readers)
        for index, word in enumerate(header):
            ring._words[index] = word
        return ring

    @classmethod
    def open(cls, name: str) -> Ring:
        """Maps a segment by the name its creator sent.

        Raises:
            RingError: the name is not a ring's, or the segment is not a ring of this version.
            OSError: it is not there.
        """
        if not _NAME.fullmatch(name):
            raise RingError(f"{name!r} is not the name of a ring")
        fd = os.open(_SHM / name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            size = os.fstat(fd).st_size
            if not _HEADER_BYTES < size <= MAX_SEGMENT_BYTES:
                raise RingError(f"segment {name} has {size} bytes, which no ring has")
            mapping = mmap.mmap(fd, size)
            with memoryview(mapping) as view, view[:_HEADER_BYTES].cast("Q") as words:
                magic, version, slot_bytes, num_slots, num_readers = words[:5]
            if (magic, version) != (_MAGIC, _RING_VERSION):
                raise RingError(f"segment {name} is not a ring of version {_RING_VERSION}")
            shape = RingShape(slot_bytes, num_slots, num_readers)
            if shape.segment_bytes != size:
                raise RingError(f"segment {name} has {size} bytes, its header needs {shape.segment_bytes}")
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, mapping, shape, name)

    def unlink(self) -> None:
        """Removes the name; mappings stay. A name already gone is fine."""
        with suppress(FileNotFoundError):
            os.unlink(_SHM / self.name)

    def close(self) -> None:
        """Unmaps the segment."""
        self._words.release()
        self._bytes.release()
        self._mapping.close()
        os.close(self._fd)

    def reserve(self, start: int, size: int) -> None:
        """Makes sure that there is memory for a part of the segment.

        Raises:
            RingMemoryError: there is none.
        """
        try:
            os.posix_fallocate(self._fd, start, size)
        except OSError as error:
            raise RingMemoryError(
                f"no memory in {_SHM} for a record of {size} bytes: {error.strerror}"
            ) from error

    def slot(self, cursor: int) -> int:
        """Byte offset of the slot that record number `cursor` lies in."""
        return _HEADER_BYTES + cursor % self.shape.num_slots * self._stride


class RingWriter:
    """The one writer of a ring."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._written = ring._words[_WRITE_CURSOR]
        self._reserved = [min(_RESERVED, ring.shape.stride)] * ring.shape.num_slots

    def write(self, record: bytes) -> None:
        """Appends a record.

        Raises:
            RingError: the record is larger than a slot, or the slowest reader is a whole ring behind, neither
                of which happens while both sides keep the limits agreed in the handshake.
            RingMemoryError: there is no memory left for so large a one; nothing was written.
        """
        ring, shape = self._ring, self._ring.shape
        if len(record) > shape.slot_bytes:
            raise RingError(f"a record of {len(record)} bytes does not fit a slot of {shape.slot_bytes}")
        words = ring._words
        slowest = words[_READ_CURSORS]
        for reader in range(1, shape.num_readers):
            slowest = min(slowest, words[_READ_CURSORS + _LINE_WORDS * reader])
        if self._written - slowest >= shape.num_slots:
            raise RingError(f"the ring is full: a reader is {self._written - slowest} records behind")
        start = ring.slot(self._written)
        if 8 + len(record) > self._reserved[self._written % shape.num_slots]:
            self._reserve(start, 8 + len(record))
        _LENGTH.pack_into(ring._bytes, start, len(record))
        ring._bytes[start + 8 : start + 8 + len(record)] = record
        self._written += 1
        words[_WRITE_CURSOR] = self._written

    def _reserve(self, start: int, needed: int) -> None:
        """Reserves more of the slot at `start` than was needed so far, in few calls."""
        size = min(2 * needed, self._ring.shape.stride)
        self._ring.reserve(start, size)
        self._reserved[self._written % self._ring.shape.num_slots] = size


class RingReader:
    """One reader of a ring.

    Args:
        ring: the mapped ring.
        index: which read cursor is this reader's.
    """

    def __init__(self, ring: Ring, index: int = 0) -> None:
        if not 0 <= index < ring.shape.num_readers:
            raise RingError(f"reader {index} of a ring with {ring.shape.num_readers} readers")
        self._ring = ring
        self._cursor = _READ_CURSORS + _LINE_WORDS * index
        self._read = ring._words[self._cursor]

    @property
    def is_behind(self) -> bool:
        """Whether the writer has moved its cursor on. The record itself may be on its way still."""
        return self._ring._words[_WRITE_CURSOR] != self._read

    def read(self) -> bytes | None:
        """A copy of the next record, or None when all have been read.

        Raises:
            RingError: the writer has broken the ring (an impossible cursor or length).
        """
        ring = self._ring
        behind = ring._words[_WRITE_CURSOR] - self._read
        if behind == 0:
            return None
        if not 0 < behind <= ring.shape.num_slots:
            raise RingError(f"the writer is {behind} records ahead in a ring of {ring.shape.num_slots}")
        start = ring.slot(self._read)
        (length,) = _LENGTH.unpack_from(ring._bytes, start)
        if length > ring.shape.slot_bytes:
            raise RingError(f"a record claims {length} bytes in a slot of {ring.shape.slot_bytes}")
        record = bytes(ring._bytes[start + 8 : start + 8 + length])
        self._read += 1
        ring._words[self._cursor] = self._read
        return record


def _create_segment() -> tuple[str, int]:
    """The name and the descriptor of a new, empty segment. The creator's lock on it, which the kernel drops
    when the creator closes it or dies, tells others that it is in use.
    """
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        name = f"{_PREFIX}-{os.getpid()}-{secrets.token_hex(8)}"
        fd = os.open(_SHM / name, flags, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return name, fd
        os.close(fd)  # taken for an orphan before it was locked


def remove_orphans() -> list[str]:
    """Unlinks segments whose creator died between creating and unlinking them; returns their names.

    A living creator holds a lock on its segment. Process ids say nothing here: /dev/shm may be shared by
    containers, each with processes of its own numbers.
    """
    removed = []
    for path in _SHM.glob(f"{_PREFIX}-*"):
        if not _NAME.fullmatch(path.name):
            continue
        with suppress(FileNotFoundError, PermissionError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed.append(path.name)
            except BlockingIOError:
                continue  # in use
            finally:
                os.close(fd)
    return removed
