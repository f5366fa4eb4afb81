"""Fetches files over HTTP so that what arrived is never fetched again, however the process ends.

A file grows under a name of its own (`<name>.incomplete`) and gets its name when it is whole and right. The
next try asks the server for the rest alone (a Range request, RFC 9110, section 14).
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import random
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from http.client import HTTPMessage
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from pagewire.base.errors import ConfigError

NUM_CONNECTIONS = 8
ATTEMPTS = 5
PAUSE_SECONDS = 0.5
TIMEOUT_SECONDS = 30.0
_CHUNK_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)
# The network's failures that may pass. A failure of the disk is an OSError too, and none of these.
_TRANSIENT = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError)
_TRANSIENT_STATUSES = (408, 425, 429, 500, 502, 503, 504)


class HubUnreachable(Exception):
    """There is no network, or no hub at its end, or it is forbidden to ask."""


class HubRefused(Exception):
    """The hub answered with an error that another try will not change.

    Attributes:
        status: HTTP's.
    """

    def __init__(self, url: str, status: int) -> None:
        super().__init__(f"{url}: status {status}")
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file on a server.

    Attributes:
        url: its address.
        target: where it is to lie.
        size: bytes.
        sha256: of its content, in hexadecimal, where it is known.
        headers: of requests to this host; not sent on to others to which it redirects.
    """

    url: str
    target: Path
    size: int
    sha256: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def bytes_to_fetch(files: Sequence[RemoteFile]) -> int:
    """How much of them has not arrived yet."""
    return sum(file.size - _arrived(file) for file in _once(files))


def fetch_files(files: Sequence[RemoteFile], advance: Callable[[int], None]) -> None:
    """Fetches what is not there yet, several files at once.

    Args:
        advance: told how many bytes have arrived in this call; called by several threads, one at a time.

    Raises:
        HubUnreachable: the network failed too often.
        HubRefused: the server refuses a file.
        ConfigError: a file is not what the server promised.
        OSError: it cannot be written.
    """
    progress = _Progress(advance)
    pool = ThreadPoolExecutor(NUM_CONNECTIONS, "fetch")
    try:
        futures = [pool.submit(_fetch, file, progress) for file in _once(files)]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    finally:
        progress.stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)


def open_url(url: str, headers: Mapping[str, str] | None = None) -> http.client.HTTPResponse:
    """The answer to a GET request. The headers, which may hold a token, are for this host alone and not for
    others to which it redirects.

    Raises:
        HubRefused: the server answered with an error.
        OSError, http.client.HTTPException: it could not be asked.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise ConfigError(f"{url} is not an address that begins with http:// or https://")
    request = urllib.request.Request(url)
    for name, value in (headers or {}).items():
        request.add_unredirected_header(name, value)
    try:
        return _OPENER.open(request, timeout=TIMEOUT_SECONDS)  # type: ignore[no-any-return]
    except urllib.error.HTTPError as error:
        error.close()
        raise HubRefused(url, error.code) from error


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that there is no space left."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Takes a request's headers along where it stays on its host, such as to a repository's new name."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        redirected = super().redirect_request(req, fp, code, msg, headers, newurl)
        if redirected is not None:
            same_host = urlsplit(newurl)[:2] == urlsplit(req.full_url)[:2]
            for name, value in req.unredirected_hdrs.items():
                if same_host or name == "Range":
                    redirected.add_unredirected_header(name, value)
        return redirected


_OPENER = urllib.request.build_opener(_Redirects)


class _Progress:
    """Counts bytes of several threads."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.stopped = threading.Event()
        self._advance = advance
        self._lock = threading.Lock()
        self._done = 0

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._advance(self._done)


def _once(files: Sequence[RemoteFile]) -> Collection[RemoteFile]:
    """Files of the same content may have the same place."""
    return {file.target: file for file in files}.values()


def _partial(file: RemoteFile) -> Path:
    return file.target.with_name(f"{file.target.name}.incomplete")


def _arrived(file: RemoteFile) -> int:
    if file.target.is_file():
        return file.size
    partial = _partial(file)
    return min(partial.stat().st_size, file.size) if partial.is_file() else 0


def _fetch(file: RemoteFile, progress: _Progress) -> None:
    if file.target.is_file():
        return
    file.target.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while (before := _arrived(file)) < file.size or not _partial(file).exists():
        try:
            _fetch_rest(file, before, progress)
        except HubRefused as error:
            if error.status not in _TRANSIENT_STATUSES or failures == ATTEMPTS - 1:
                raise
        except _TRANSIENT as error:
            if failures == ATTEMPTS - 1:
                raise HubUnreachable(f"{file.url}: {error}") from error
        if progress.stopped.is_set():
            return
        # A connection that breaks after a while is no reason to give up.
        arrived = _arrived(file)
        failures = 0 if arrived > before or arrived == file.size else failures + 1
        if failures:
            time.sleep(PAUSE_SECONDS * 2**failures * random.uniform(0.5, 1))
    _require_right(file)
    _partial(file).rename(file.target)


def _fetch_rest(file: RemoteFile, start: int, progress: _Progress) -> None:
    """Appends to what is there. A server that sends the whole file instead is taken at its word."""
    headers = {**file.headers, **({"Range": f"bytes={start}-"} if start else {})}
    with open_url(file.url, headers) as response:
        appends = response.status == http.client.PARTIAL_CONTENT
        if appends and not (response.headers["Content-Range"] or "").startswith(f"bytes {start}-"):
            raise http.client.HTTPException(
                f"asked from byte {start}, got {response.headers['Content-Range']}"
            )
        with _partial(file).open("ab" if appends else "wb") as partial:
            left = file.size - (start if appends else 0)
            while left and not progress.stopped.is_set():
                chunk = response.read1(min(_CHUNK_BYTES, left))  # what has come, to lose none of it
                if not chunk:
                    raise http.client.IncompleteRead(b"", left)
                partial.write(chunk)
                left -= len(chunk)
                progress.add(len(chunk))


def _require_right(file: RemoteFile) -> None:
    """Raises ConfigError, after removing what arrived, unless it is what the hub says it has."""
    if file.sha256 is None:
        return
    digest = hashlib.sha256()
    with _partial(file).open("rb") as partial:
        while chunk := partial.read(_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != file.sha256.lower():
        _partial(file).unlink()
        raise ConfigError(
            f"{file.url}: what arrived has the sha256 {digest.hexdigest()} and not {file.sha256}; it was "
            "removed, try again"
        )
