"""The adapters that a scheduler serves: loading, placing and unloading them on its workers.

Workers are told by plans (engine/dispatch/adapters.py), which every rank executes between the same two
steps. A piece of work takes a worker a few milliseconds at most, and a command is sent until nothing of it
is left.

An adapter's id follows from its name and the content of its files. So replicas agree on it, a scheduler that
takes over knows the adapters that its worker tells it of, and another adapter of the same name has another
id, with which no cached prefix of the former is found.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from engine.dispatch.adapters import AdapterCommand, AdapterFacts
from engine.dispatch.control import ADAPTER_STEP
from engine.dispatch.facts import WorkerFacts
from engine.dispatch.records import StepPlan, StepResult
from engine.dispatch.sampling import u32
from pagewire.base.errors import (
    ConfigError,
    InvalidRequest,
    NotFound,
    Overloaded,
    PagewireError,
    Unavailable,
    Unsupported,
)
from pagewire.hub.adapters import adapter_digest, resolve_adapter
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from scheduler.core import Scheduler
from scheduler.request import Request

logger = logging.getLogger(__name__)

MAX_ADAPTERS = 4096
MAX_PATH_BYTES = 4096
_NAME = re.compile(r"[\w.][\w./:@ -]{0,127}")
# Between two questions whether an adapter is read.
_POLL_SECONDS = 0.01
# An adapter that a worker still has, but that is not served any more, may be what requests run with that are
# submitted again.
_RESUME_SECONDS = 60.0


@dataclass(slots=True, eq=False)
class AdapterEntry:
    """An adapter that is served, or was and is still in use.

    Attributes:
        facts: which one.
        created: Unix time since when it is served.
        is_served: whether new requests may name it.
        is_loaded: whether the attached workers have it.
        open_requests: that run with it or wait.
        done: set when it is loaded for the first time, or to why it cannot be.
    """

    facts: AdapterFacts
    done: asyncio.Future[None]
    created: float = field(default_factory=time.time)
    is_served: bool = False
    is_loaded: bool = False
    open_requests: set[Request] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class _Job:
    """A command, and when it may be sent again."""

    command: AdapterCommand
    entry: AdapterEntry
    not_before: float = 0.0


class AdapterManager:
    """Owns the adapters of one scheduler. Used on the event loop only.

    Args:
        configured: those that are served from the start, name -> path.
        end: ends the requests of an adapter that is lost, with an error.
        changed: called when other adapters are served than before.
        pump: called when there is something to send.

    Attributes:
        num_requests, num_tokens: requests that ended with each adapter, by its name, and what they were
            given.
    """

    def __init__(
        self,
        configured: Mapping[str, str],
        *,
        end: Callable[[Sequence[Request], PagewireError], None],
        changed: Callable[[], None],
        pump: Callable[[], None],
    ) -> None:
        self._configured = dict(configured)
        self._end, self._changed, self._pump = end, changed, pump
        self._entries: dict[int, AdapterEntry] = {}
        self._names: dict[str, AdapterEntry] = {}
        self._core: Scheduler | None = None
        self._num_slots = 0
        self._jobs: list[_Job] = []
        self._sent: _Job | None = None
        self._start: asyncio.Task[None] | None = None
        self.failed: asyncio.Future[None] | None = None
        self.num_requests: Counter[str] = Counter()
        self.num_tokens: Counter[str] = Counter()

    @property
    def in_flight(self) -> bool:
        """Whether the workers do a piece of work."""
        return self._sent is not None

    @property
    def is_settled(self) -> bool:
        """Whether the adapters that are served from the start are there."""
        return not self._configured

    @property
    def served(self) -> list[AdapterEntry]:
        """The adapters that requests may name."""
        return list(self._names.values())

    def in_use(self) -> tuple[int, list[str], list[str]]:
        """(slots, names of the adapters that requests run with, of those that requests only wait for)."""
        running = set() if self._core is None else set(self._core.adapters.in_use)
        open_ones = [entry.facts for entry in self._entries.values() if entry.open_requests]
        return (
            self._num_slots,
            [facts.name for facts in open_ones if facts.adapter_id in running],
            [facts.name for facts in open_ones if facts.adapter_id not in running],
        )

    def messages(self) -> list[pb.Adapter]:
        """The adapters that requests may name, as messages."""
        return [_message(entry) for entry in self.served]

    def check(self, adapter_id: int) -> None:
        """Raises:
        InvalidRequest: there is no such adapter.
        """
        if adapter_id and adapter_id not in self._entries:
            raise InvalidRequest(
                "the adapter was unloaded; send the request again with the name of one that is served",
                param="model",
            )

    def opened(self, request: Request) -> None:
        """A request was accepted."""
        entry = self._entries.get(request.adapter_id)
        if entry is not None:
            entry.open_requests.add(request)

    def ended(self, request: Request) -> None:
        """A request has ended."""
        entry = self._entries.get(request.adapter_id)
        if entry is not None and request in entry.open_requests:
            entry.open_requests.remove(request)
            self.num_requests[entry.facts.name] += 1
            self.num_tokens[entry.facts.name] += request.num_output_tokens
            self._drop_if_unused(entry)

    def attach(self, core: Scheduler, facts: WorkerFacts) -> None:
        """Workers were attached: adopts the adapters that they have, and has them load those that they
        lack."""
        self._core, self._num_slots, self._sent = core, facts.limits.max_loras, None
        self._jobs = []
        there = {each.adapter_id: each for each in facts.adapters}
        for adapter in facts.adapters:
            self._adopt(adapter)
        for entry in self._entries.values():
            entry.is_loaded = entry.facts.adapter_id in there
            if entry.is_loaded:
                core.adapters.loaded(entry.facts.adapter_id)
            else:
                self._add("load", entry)
        if self._configured and self._start is None:
            self._start = asyncio.create_task(self._load_configured())

    def _adopt(self, adapter: AdapterFacts) -> None:
        """An adapter that an earlier scheduler had loaded."""
        if adapter.adapter_id in self._entries:
            return
        entry = AdapterEntry(adapter, _done())
        self._entries[adapter.adapter_id] = entry
        if adapter.retired:
            asyncio.get_running_loop().call_later(_RESUME_SECONDS, self._drop_if_unused, entry)
        else:
            self._serve(entry)

    def detach(self) -> None:
        """The workers are lost, and what they had."""
        self._core, self._sent = None, None
        self._jobs = []
        for entry in self._entries.values():
            entry.is_loaded = False

    async def _load_configured(self) -> None:
        try:
            for name, path in list(self._configured.items()):
                await self.load(name, path, in_place=True)
            self._configured.clear()
            self._changed()
        except PagewireError as error:
            if self.failed is not None and not self.failed.done():
                self.failed.set_exception(ConfigError(f"lora_modules: {error.message}", param="lora_modules"))

    async def load(self, name: str, path: str, *, in_place: bool) -> AdapterEntry:
        """Has all workers load an adapter; returns once requests may name it.

        Raises:
            InvalidRequest, ConfigError: the name is taken or is none, or the adapter is missing, damaged or
                made for another model.
            Overloaded: there are too many.
            Unsupported, Unavailable: no adapters are served, or no engine is attached.
        """
        self._require_slots()
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                f"lora_name is {name!r}; it must be 1 to 128 letters, digits and ./:@_-", param="lora_name"
            )
        self._require_free(name, in_place)
        if not path or len(path.encode(errors="replace")) > MAX_PATH_BYTES:
            raise InvalidRequest(
                f"lora_path must have 1 to {MAX_PATH_BYTES} bytes: a directory, or owner/name on a hub",
                param="lora_path",
            )
        facts = await asyncio.to_thread(identify_adapter, name, path)
        self._require_free(name, in_place)
        entry = self._entries.get(facts.adapter_id)
        if entry is None:
            if len(self._entries) >= MAX_ADAPTERS:
                raise Overloaded(f"{MAX_ADAPTERS} adapters are loaded, the most there may be; unload some")
            entry = AdapterEntry(facts, asyncio.get_running_loop().create_future())
            self._entries[facts.adapter_id] = entry
            self._add("load", entry)
        elif entry.facts.name != name:
            raise InvalidRequest("two adapters have the same identity; rename one", param="lora_name")
        await asyncio.shield(entry.done)
        self._serve(entry)
        self._changed()
        return entry

    async def unload(self, name: str) -> None:
        """Serves an adapter no more. Requests that run with it keep it.

        Raises:
            NotFound: there is none of this name.
            Unsupported: no adapters are served.
        """
        self._require_slots()
        entry = self._names.get(name)
        if entry is None:
            known = ", ".join(map(repr, self._names)) or "none"
            raise NotFound(f"there is no adapter {name!r}; there is {known}", param="lora_name")
        self._retire(entry)
        self._changed()

    def _require_slots(self) -> None:
        if self._core is None:
            raise Unavailable("no engine is attached; try again later")
        if not self._num_slots:
            raise Unsupported("this service has no adapters; start it with --enable-lora")

    def _require_free(self, name: str, in_place: bool) -> None:
        if not in_place and name in self._names:
            raise InvalidRequest(
                f"the adapter {name!r} is loaded already; set load_inplace to put another in its place",
                param="lora_name",
            )

    def _serve(self, entry: AdapterEntry) -> None:
        """Requests may name it from now on; one of the same name is served no more."""
        former = self._names.get(entry.facts.name)
        if former is entry:
            return
        if former is not None:
            self._retire(former)
        entry.is_served = True
        self._names[entry.facts.name] = entry

    def _retire(self, entry: AdapterEntry) -> None:
        entry.is_served = False
        self._names.pop(entry.facts.name, None)
        if entry.open_requests:
            self._add("retire", entry)
        self._drop_if_unused(entry)

    def _drop_if_unused(self, entry: AdapterEntry) -> None:
        if entry.is_served or entry.open_requests or not entry.done.done():
            return
        if self._entries.pop(entry.facts.adapter_id, None) is not None and self._core is not None:
            self._core.adapters.dropped(entry.facts.adapter_id)
            self._add("drop", entry)

    def _add(self, kind: str, entry: AdapterEntry, slot: int = -1) -> None:
        self._jobs.append(_Job(AdapterCommand(kind, entry.facts, slot), entry))
        self._pump()

    def next_plan(self, now: float) -> StepPlan | None:
        """The next piece of work for the workers, if one is due and none is in flight."""
        if self._sent is not None or self._core is None:
            return None
        placement = self._core.adapters.next_placement()
        if placement is not None:
            adapter_id, slot = placement
            command = AdapterCommand("place", self._entries[adapter_id].facts, slot)
            self._jobs.insert(0, _Job(command, self._entries[adapter_id]))
        job = next((job for job in self._jobs if job.not_before <= now), None)
        if job is None:
            return None
        self._sent = job
        return adapter_plan(job.command)

    def next_at(self) -> float | None:
        """When a piece is due next; None for never."""
        return min((job.not_before for job in self._jobs), default=None) if self._sent is None else None

    def finished(self, result: StepResult) -> None:
        """Takes the answer to the piece in flight."""
        job, self._sent = self._sent, None
        if job is None:
            raise ValueError("an adapter command was answered that was not sent")
        if result.more_ahead and not result.error:
            wait = _POLL_SECONDS if job.command.kind == "load" else 0.0
            job.not_before = time.monotonic() + wait
            self._jobs.remove(job)
            self._jobs.append(job)  # others take turns with it
            return
        self._jobs.remove(job)
        if result.error:
            self._fail(job, result.error)
        else:
            self._complete(job)

    def _complete(self, job: _Job) -> None:
        assert self._core is not None
        entry, adapter_id = job.entry, job.entry.facts.adapter_id
        if job.command.kind == "place":
            self._core.adapters.placed(adapter_id, job.command.slot)
        elif job.command.kind == "load":
            entry.is_loaded = True
            self._core.adapters.loaded(adapter_id)
            if not entry.done.done():
                logger.info("adapter %s is loaded from %s", entry.facts.name, entry.facts.path)
                entry.done.set_result(None)

    def _fail(self, job: _Job, message: str) -> None:
        """An adapter that cannot be loaded is refused; one that cannot be loaded again is lost."""
        assert self._core is not None
        entry, adapter_id, kind = job.entry, job.entry.facts.adapter_id, job.command.kind
        logger.error("adapter %s: %s", entry.facts.name, message)
        if kind == "place":
            self._core.adapters.not_placed(adapter_id)
        if kind in ("drop", "retire"):
            return
        self._entries.pop(adapter_id, None)
        if self._names.get(entry.facts.name) is entry:
            del self._names[entry.facts.name]
            entry.is_served = False
            self._changed()
        error = InvalidRequest(message, param="lora_path")
        if not entry.done.done():
            entry.done.set_exception(error)
            entry.done.exception()  # nobody may be waiting
        self._core.adapters.dropped(adapter_id)
        requests = list(entry.open_requests)
        entry.open_requests.clear()
        lost = Unavailable(f"the adapter {entry.facts.name!r} is lost: {message}")
        self._end(requests, lost)
        self._add("drop", entry)

    def close(self) -> None:
        """Ends what is under way."""
        if self._start is not None:
            self._start.cancel()


def _message(entry: AdapterEntry) -> pb.Adapter:
    facts = entry.facts
    return pb.Adapter(
        adapter_id=facts.adapter_id, name=facts.name, path=facts.path, created=int(entry.created)
    )


def adapter_message(entry: AdapterEntry) -> pb.Adapter:
    """An adapter as a message."""
    return _message(entry)


def _done() -> asyncio.Future[None]:
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    done.set_result(None)
    return done


def identify_adapter(name: str, path: str) -> AdapterFacts:
    """Which adapter there is at a path. Fetches it if need be and reads all of it. Slow: not for an event
    loop.

    Raises:
        ConfigError: there is no such adapter.
    """
    directory = resolve_adapter(path)
    digest = adapter_digest(directory)
    return AdapterFacts(adapter_id_of(name, digest), name, str(directory), digest)


def adapter_id_of(name: str, digest: str) -> int:
    """An adapter's id: 31 bits that are not 0."""
    identity = hashlib.sha256(f"{name}\0{digest}".encode()).digest()
    return int.from_bytes(identity[:4], "little") >> 1 | 1


def adapter_plan(command: AdapterCommand) -> StepPlan:
    """The plan that has workers execute a command."""
    empty = u32([])
    return StepPlan(
        ADAPTER_STEP, empty, [], empty, empty, empty, empty, empty, empty, adapter_command=command
    )
