"""Tells frontends which blocks are cached and how much there is to do, so that they can choose a scheduler.

Changes are collected and told a few times a second at most. Nothing is collected while nobody listens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from pagewire.scheduler.v1 import scheduler_pb2 as pb
from pagewire.wire.block_hashes import BlockHash
from scheduler.core import Scheduler
from scheduler.request import Request

TELL_SECONDS = 0.02
"""Changes wait so long for others: a message for each step would cost both sides more than it is worth."""

MAX_CHANGES_SHARE = 2
"""A stream that takes nothing is told of the whole cache once more changes wait for it than so many times the
number of blocks."""


class CacheWatcher(Protocol):
    """A listener beside the streams, such as the publisher of KV events."""

    def stored(self, request: Request, index: int) -> None:
        """See `CacheListener`."""

    def removed(self, block_hash: BlockHash) -> None:
        """A block cannot be found any more."""

    def cleared(self) -> None:
        """No block can be found any more."""

    def flush(self) -> None:
        """Passes on what was collected."""


class CacheChanges:
    """What one stream has yet to be told."""

    def __init__(self, snapshot: Iterable[BlockHash]) -> None:
        self._changes: dict[BlockHash, bool] = dict.fromkeys(snapshot, True)
        self._cleared = True

    def __len__(self) -> int:
        return len(self._changes)

    def stored(self, block_hash: BlockHash) -> None:
        """A block can be found."""
        self._changes[block_hash] = True

    def removed(self, block_hash: BlockHash) -> None:
        """A block cannot be found any more."""
        if self._cleared:
            self._changes.pop(block_hash, None)
        else:
            self._changes[block_hash] = False

    def reset(self, snapshot: Iterable[BlockHash]) -> None:
        """Everything told before is void; `snapshot` is all there is."""
        self._changes = dict.fromkeys(snapshot, True)
        self._cleared = True

    def take(self, num_requests: int, num_own_requests: int) -> pb.CacheChanges:
        """The message about what has changed since the last one."""
        changes, cleared = self._changes, self._cleared
        self._changes, self._cleared = {}, False
        return pb.CacheChanges(
            cleared=cleared,
            stored=b"".join(block_hash for block_hash, is_there in changes.items() if is_there),
            removed=b"".join(block_hash for block_hash, is_there in changes.items() if not is_there),
            num_requests=num_requests,
            num_own_requests=num_own_requests,
        )


class CacheFeed:
    """Listens to the pool of the attached worker's core, for all streams that asked. A `CacheListener`.

    Args:
        tell: called when there is something to tell, at most once in `TELL_SECONDS`.
    """

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell
        self._core: Scheduler | None = None
        self._streams: set[CacheChanges] = set()
        self._watchers: list[CacheWatcher] = []
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_on(self) -> bool:
        """Whether anybody listens."""
        return bool(self._streams or self._watchers)

    def add_watcher(self, watcher: CacheWatcher) -> None:
        """Adds a listener beside the streams. It is told of what comes from now on."""
        self._watchers.append(watcher)
        self._listen()

    def subscribe(self) -> CacheChanges:
        """A stream's share of what is told, which begins with all that is cached now."""
        changes = CacheChanges(self._snapshot())
        self._streams.add(changes)
        self._listen()
        self.touch()
        return changes

    def unsubscribe(self, changes: CacheChanges) -> None:
        """Ends it."""
        self._streams.discard(changes)
        self._listen()

    def attach(self, core: Scheduler | None) -> None:
        """Listens to another core, whose cache is empty; None for none."""
        self._core = core
        self._listen()
        if self.is_on:
            self.cleared()

    def _listen(self) -> None:
        if self._core is not None:
            self._core.pool.listener = self if self.is_on else None

    def _snapshot(self) -> Iterator[BlockHash]:
        if self._core is None:
            return
        for key in self._core.pool.cached_hashes():
            block_hash = self._core.prefixes.told_hash(key)
            if block_hash is not None:
                yield block_hash

    def stored(self, request: Request, index: int) -> None:
        """See `CacheListener`."""
        block_hash = request.block_hashes[index]
        for changes in self._streams:
            changes.stored(block_hash)
        for watcher in self._watchers:
            watcher.stored(request, index)
        self.touch()

    def removed(self, key: BlockHash) -> None:
        """See `CacheListener`."""
        assert self._core is not None
        block_hash = self._core.prefixes.told_hash(key)
        if block_hash is None:
            return
        for changes in self._streams:
            changes.removed(block_hash)
        for watcher in self._watchers:
            watcher.removed(block_hash)
        self.touch()

    def cleared(self) -> None:
        """See `CacheListener`."""
        for changes in self._streams:
            changes.reset(())
        for watcher in self._watchers:
            watcher.cleared()
        self.touch()

    def touch(self) -> None:
        """Has everybody told soon: a request came or ended, or the cache has changed."""
        if self._timer is None and self.is_on:
            self._timer = asyncio.get_running_loop().call_later(TELL_SECONDS, self._due)

    def _due(self) -> None:
        self._timer = None
        if self._core is not None:
            most = MAX_CHANGES_SHARE * self._core.pool.num_blocks
            for changes in self._streams:
                if len(changes) > most:
                    changes.reset(self._snapshot())
        for watcher in self._watchers:
            watcher.flush()
        self._tell()

    def close(self) -> None:
        """Tells no more."""
        if self._timer is not None:
            self._timer.cancel()
