"""Records of a ring, each read only after its signal was taken.

See ring.py for why: the signal is what makes a record visible as a whole.
"""

from __future__ import annotations

import os

from engine.dispatch.ring import Ring, RingReader


class SignalledReader:
    """One reader of a ring, with the eventfd that the writer adds one to after every record.

    Args:
        ring: the mapped ring.
        index: which read cursor is this reader's.
        fd: the eventfd, non-blocking; no other reader takes its signals. It stays the caller's.
    """

    def __init__(self, ring: Ring, index: int, fd: int) -> None:
        self._reader = RingReader(ring, index)
        self._fd = fd
        self._num_signalled = 0

    def read(self) -> bytes | None:
        """A copy of the next record, or None when none is there whole. No system call where nothing has come,
        one for all that has come together.

        Raises:
            RingError: the writer has broken the ring.
        """
        if not self._num_signalled:
            if not self._reader.is_behind:
                return None
            self.take_signals()
            if not self._num_signalled:
                return None
        record = self._reader.read()
        if record is not None:
            self._num_signalled -= 1
        return record

    def take_signals(self) -> None:
        """Takes the signals so far, so that the eventfd is quiet until the next one."""
        try:
            self._num_signalled += os.eventfd_read(self._fd)
        except BlockingIOError:
            return  # quiet already
