"""An output file that survives kill -9: whole lines are appended and made durable, and a torn last line is
removed before more are."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from pagewire.base.errors import ConfigError

_CHUNK = 1 << 16


class ResultFile:
    """The results of one run, and of earlier runs that it goes on with. Owns the file and a lock on it."""

    def __init__(self, path: Path, opening: bytes) -> None:
        """Opens or makes the file, and repairs it.

        Args:
            path: of the file.
            opening: what every line of it begins with, by which it is told from files of other kinds.

        Raises:
            ConfigError: it cannot be written, another run writes it, or it holds something else.
        """
        self._path, self._opening = path, opening
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        try:
            self._lock()
            self._repair()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._file)

    def lines(self) -> Iterator[bytes]:
        """The results that are there, without their ends.

        Raises:
            ConfigError: a line is something else.
        """
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.startswith(self._opening):
                    raise self._other(f"line {number}")
                yield line.rstrip(b"\n")

    def append(self, lines: Sequence[bytes]) -> None:
        """Adds results. They are on disk when it returns. Slow: not for an event loop.

        Args:
            lines: without their ends.

        Raises:
            ConfigError: the disk is full, or broken.
        """
        data = memoryview(b"".join(line + b"\n" for line in lines))
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except OSError as error:
            raise ConfigError(
                f"{self._path}: {error.strerror}; once that is mended, the same command goes on"
            ) from error

    def _lock(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise ConfigError(f"{self._path} is no ordinary file; results that a run can go on with need one")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{self._path} is being written by another run; wait for its end, or name another file"
            ) from None
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be locked: {error.strerror}") from error

    def _repair(self) -> None:
        """Cuts off what follows the last end of a line."""
        size = os.fstat(self._file).st_size
        end = size
        while end > 0:
            begin = max(0, end - _CHUNK)
            found = os.pread(self._file, end - begin, begin).rfind(b"\n")
            if found >= 0:
                end = begin + found + 1
                break
            end = begin
        if end == size:
            return
        torn = os.pread(self._file, len(self._opening), end)
        if not self._opening.startswith(torn):
            raise self._other("its last line")
        os.ftruncate(self._file, end)

    def _other(self, where: str) -> ConfigError:
        return ConfigError(
            f"{self._path} exists and is no file of results ({where} does not begin with "
            f"{self._opening.decode()}); name another file"
        )
