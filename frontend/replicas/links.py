"""The frontend's streams to all schedulers: which one gets a request, and what happens when one is lost.

A replica is a scheduler with its workers. A request goes to the replica that has the longest prefix of it
cached, unless that has too much to do already (router.py). When a replica is lost its open requests are
submitted to another one with the tokens they have; sampling is keyed by seed and position, so that the
continuation is the same.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

from frontend.generation.open_request import OpenRequest, Submission, Wakeup
from frontend.replicas.addresses import RESOLVE_SECONDS, Address, Addresses
from frontend.replicas.exposition import merged_expositions
from frontend.replicas.router import Router
from frontend.replicas.same_model import common_facts, why_another_model
from frontend.scheduler_link import MAX_UNSENT, SchedulerLink
from pagewire.base.errors import NotFound, PagewireError, Unavailable
from pagewire.base.tls import ClientTls
from pagewire.scheduler.v1 import scheduler_pb2
from pagewire.wire.block_hashes import BlockHash, RecentChains, root_hash

logger = logging.getLogger(__name__)
T = TypeVar("T")

_LOOK_AGAIN = 0.05
_NO_HASHES: list[BlockHash] = []


class SchedulerLinks:
    """Owns the links, the index of their prefixes and the choice among them, all on one event loop.

    With a single scheduler nothing is indexed and nothing chosen.

    Attributes:
        links: one for each scheduler.
        model: facts about the served model that hold for all schedulers in use; None before the first has
            told.
        failed: completes with the exception if a link itself breaks; it never does otherwise.
        num_moved: requests that went on at another scheduler because theirs was lost or drained.
        num_routed: requests sent to each scheduler, by its name, where there are several.
        num_prefix_tokens: tokens of these that it had cached, as far as was known.
    """

    def __init__(
        self, schedulers: str, *, reconnect_timeout: float = 30.0, tls: ClientTls | None = None
    ) -> None:
        """Args:
        schedulers: addresses with commas between them; see `Addresses`.
        reconnect_timeout: seconds that open requests wait while no scheduler is there before they are ended,
            and new ones for a scheduler or an engine before they are refused.
        tls: how schedulers are to prove who they are; None for plain connections.

        Raises:
            ConfigError: an address or a file of `tls` is wrong.
        """
        self._addresses = Addresses.parse(schedulers)
        self._reconnect_timeout, self._tls = reconnect_timeout, tls
        self._is_single = self._addresses.is_single
        self.links: list[SchedulerLink] = []
        self.model: scheduler_pb2.GetModelResponse | None = None
        self.num_moved = 0
        self.num_routed: Counter[str] = Counter()
        self.num_prefix_tokens: Counter[str] = Counter()
        self._router = Router()
        self._chains: RecentChains | None = None
        self._listeners: list[Callable[[], None]] = []
        self._has_changed = asyncio.Event()
        self._heard = asyncio.Event()
        self._expects_none = False
        self._num_waiting = 0
        self._next_number = 0
        self._resolving: asyncio.Task[None] | None = None
        self._is_stopping = False
        # Schedulers that were given the adapters of others, and what gives them.
        self._caught_up: set[int] = set()
        self._loading: set[asyncio.Task[None]] = set()
        for address in self._addresses.listed:
            self._add(address)

    # What concerns all links.

    @property
    def ready(self) -> bool:
        """Whether there is a scheduler with an engine that takes requests."""
        return any(link.takes_requests for link in self.links)

    @property
    def are_several(self) -> bool:
        """Whether there may be more than one scheduler."""
        return not self._is_single

    @property
    def num_ready(self) -> int:
        """How many of the schedulers take requests."""
        return sum(link.takes_requests for link in self.links)

    @property
    def num_reconnects(self) -> int:
        """How often a stream was lost and came back."""
        return sum(link.num_reconnects for link in self.links)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Calls `listener` whenever `ready` or `model` may have changed."""
        self._listeners.append(listener)

    async def start(self) -> None:
        """Starts connecting to all; returns at once."""
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for link in self.links:
            await self._start(link)
        if self._addresses.are_looked_up:
            self._resolving = asyncio.create_task(self._keep_resolving(), name="resolve schedulers")

    async def stop(self) -> None:
        """Ends the streams. Requests still open end with reason ABORT."""
        if self._resolving is not None:
            self._resolving.cancel()
            await asyncio.wait([self._resolving])
        self._is_stopping = True
        for task in self._loading:
            task.cancel()
        await asyncio.gather(*(link.stop() for link in self.links))

    async def heard_within(self, seconds: float) -> bool:
        """Waits for the first news of any scheduler; whether they came in time."""
        return await _within(seconds, self._heard.wait())

    async def back_soon(self) -> bool:
        """Waits for a scheduler and an engine, if there are none; whether they came in time. They may have
        been lost, or this frontend be the one that was just started again. If too many wait already,
        or `expect_no_first_engine` was called, nothing is waited for."""
        if self.ready or self._num_waiting >= MAX_UNSENT:
            return self.ready
        self._num_waiting += 1
        try:
            await _within(self._reconnect_timeout, self._until_ready())
            return self.ready
        finally:
            self._num_waiting -= 1

    async def _until_ready(self) -> None:
        while not (self.ready or self._expects_none):
            self._has_changed.clear()
            await self._has_changed.wait()

    def expect_no_first_engine(self) -> None:
        """Ends the waiting in `back_soon` for the first engine since this frontend was started: it may be one
        that cannot load its model. For an engine that was there and was lost, waiting goes on.
        """
        if self.model is None:
            self._expects_none = True
            self._has_changed.set()

    def why_not_ready(self) -> str:
        """For people: what is missing."""
        if self._is_single:
            return self.links[0].why_not_ready()
        if any(link.ready for link in self.links):
            return "every scheduler is drained, or serves another model; try again shortly"
        if any(link.connected for link in self.links):
            return "no scheduler has an engine attached yet; try again shortly"
        return "no scheduler is reachable; try again shortly"

    # Requests.

    def open(self, submission: Submission, wakeup: Wakeup, beside: OpenRequest | None = None) -> OpenRequest:
        """Submits a request; `wakeup` will tell of its news.

        Args:
            beside: a request that it shares its prompt with, and the scheduler, if that still takes requests.

        Raises:
            Unavailable: no scheduler with an engine takes requests.
            Overloaded: the scheduler takes submissions more slowly than they come.
        """
        return self._link_for(submission, beside).open(submission, wakeup)

    def close(self, request: OpenRequest) -> None:
        """Ends the caller's interest in a request; its scheduler is told unless that already ended it."""
        if request.link is not None:
            request.link.close(request)

    def abort_all(self) -> None:
        """Ends every open request with reason ABORT, as at the end of a drain."""
        for link in self.links:
            link.abort_all()

    def _link_for(self, submission: Submission, beside: OpenRequest | None = None) -> SchedulerLink:
        if self._is_single:
            return self.links[0]
        candidates = {link.number: link for link in self.links if link.takes_requests}
        if submission.adapter_id:  # one that was just started may not have it yet
            having = {number: link for number, link in candidates.items() if link.has(submission.adapter_id)}
            candidates = having or candidates
        if not candidates:
            raise Unavailable(self.why_not_ready())
        if beside is not None:
            link = next((each for each in candidates.values() if each is beside.link), None)
            if link is not None:
                self.num_routed[link.name] += 1
                return link
        loads = [0] * self._next_number
        for number, link in candidates.items():
            loads[number] = link.num_open + link.load_of_others
        now = asyncio.get_running_loop().time()
        choice = self._router.choose(self._hashes(submission), loads, list(candidates), now)
        link = candidates[choice.replica]
        self.num_routed[link.name] += 1
        if choice.num_blocks and self._chains is not None:
            self.num_prefix_tokens[link.name] += choice.num_blocks * self._chains.block_size
        return link

    def _hashes(self, submission: Submission) -> list[BlockHash]:
        """Of the blocks that could be shared: the last token of a prompt is always computed."""
        if self._chains is None:
            return _NO_HASHES
        shareable = array("I", submission.prompt_ids[:-1])
        return self._chains.hash(shareable, root_hash(submission.cache_salt, submission.adapter_id))

    def _move_from(self, link: SchedulerLink) -> None:
        """Has the open requests of a link go on elsewhere, if there is anywhere."""
        if self._is_stopping or not link.num_open:
            return
        if not any(each.takes_requests for each in self.links if each is not link):
            return
        moved = link.release()
        for request in moved:
            request.note("moved to another scheduler")
            self._link_for(request.submission).adopt(request)
        self.num_moved += len(moved)
        logger.warning("scheduler %s: %d requests go on elsewhere", link.name, len(moved))

    # Single schedulers.

    def named(self, name: str) -> SchedulerLink:
        """The link to the scheduler of this name.

        Raises:
            NotFound: there is none.
        """
        for link in self.links:
            if name in (link.name, link.target):
                return link
        names = ", ".join(link.name for link in self.links)
        raise NotFound(f"there is no replica {name!r}; there are {names}")

    async def to_all(self, call: Callable[[SchedulerLink], Awaitable[T]]) -> list[T]:
        """Does something with every scheduler that is connected, at once.

        Raises:
            Unavailable: none is connected.
            PagewireError: the first error, once all have answered.
        """
        links = [link for link in self.links if link.connected]
        if not links:
            raise Unavailable(self.why_not_ready())
        answers = await asyncio.gather(*(call(link) for link in links), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def drain(self, name: str, timeout: float) -> int:
        """Gives a replica no more requests, and waits for those it has; what is open after `timeout` seconds
        goes on at another one.

        Returns:
            How many went on elsewhere.

        Raises:
            NotFound: there is no such replica.
            Unavailable: no other replica takes requests.
        """
        link = self.named(name)
        if not any(each.takes_requests for each in self.links if each is not link):
            raise Unavailable(f"no other replica than {link.name} takes requests: nobody would answer")
        link.drained = True
        self._changed()
        deadline = asyncio.get_running_loop().time() + timeout
        while link.num_open and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_AGAIN)
        num_moved = link.num_open
        self._move_from(link)
        return num_moved

    def num_open_at(self, name: str) -> int:
        """Requests of this frontend that a replica has; none where there is no such replica."""
        return sum(link.num_open for link in self.links if name in (link.name, link.target))

    def undrain(self, name: str) -> None:
        """Gives a replica requests again.

        Raises:
            NotFound: there is no such replica.
        """
        self.named(name).drained = False
        self._changed()

    # Adapters.

    async def refresh_model(self) -> None:
        """Asks for the model's facts, in case that they have changed since the schedulers told them.

        Raises:
            Unavailable: no scheduler can be reached.
        """
        await self._answers(lambda link: link.refresh_model())

    async def load_adapter(self, name: str, path: str, *, in_place: bool) -> None:
        """Has all schedulers load an adapter; returns once requests may name it.

        Raises:
            PagewireError: one cannot.
        """
        await self.to_all(lambda link: link.load_adapter(name, path, in_place=in_place))

    async def unload_adapter(self, name: str) -> None:
        """Has all schedulers unload an adapter.

        Raises:
            NotFound: one has none of this name.
            PagewireError: it cannot be.
        """
        await self.to_all(lambda link: link.unload_adapter(name))

    def _catch_up(self) -> None:
        """Has schedulers that have just been attached load the adapters that others have."""
        ready = {link.number: link for link in self.links if link.ready}
        new = ready.keys() - self._caught_up
        self._caught_up = set(ready)
        if len(ready) < 2:
            return
        for number in new:
            link = ready[number]
            others = [each for each in ready.values() if each is not link and each.number not in new]
            wanted = {adapter.name: adapter for other in others for adapter in other.adapters}
            missing = [each for each in wanted.values() if not link.has(each.adapter_id)]
            if missing and link.model is not None and link.model.allows_runtime_lora:
                task = asyncio.create_task(_load_all(link, missing), name="load adapters")
                self._loading.add(task)
                task.add_done_callback(self._loading.discard)

    # What schedulers are asked.

    async def get_load(self) -> scheduler_pb2.GetLoadResponse:
        """The load of all schedulers that can be reached, added up.

        Raises:
            Unavailable: none can be reached.
        """
        if self._is_single:
            return await self.links[0].get_load()
        total = scheduler_pb2.GetLoadResponse()
        for load in await self._answers(lambda link: link.get_load()):
            for field in total.DESCRIPTOR.fields:
                setattr(total, field.name, getattr(total, field.name) + getattr(load, field.name))
        return total

    async def get_metrics(self) -> bytes:
        """The schedulers' metrics in Prometheus text format; of several, each with the label `replica`.

        Raises:
            Unavailable: none can be reached.
        """
        if self._is_single:
            return await self.links[0].get_metrics()

        async def of(link: SchedulerLink) -> tuple[str, bytes]:
            return link.name, await link.get_metrics()

        return merged_expositions(await self._answers(of))

    async def get_timeline(self, request_id: str, client: str) -> Sequence[scheduler_pb2.Timeline]:
        """What happened to a client's request, part by part. A part that was moved is told of by the
        scheduler that had it last.

        Raises:
            NotFound: no scheduler knows of such a request of this client.
            Unavailable: none can be reached.
        """
        if self._is_single:
            return await self.links[0].get_timeline(request_id, client)
        missing: list[NotFound] = []

        async def of(link: SchedulerLink) -> Sequence[scheduler_pb2.Timeline]:
            try:
                return await link.get_timeline(request_id, client)
            except NotFound as error:
                missing.append(error)
                return ()

        latest: dict[int, scheduler_pb2.Timeline] = {}
        for parts in await self._answers(of):
            for part in parts:
                known = latest.get(part.part)
                if known is None or part.queued > known.queued:
                    latest[part.part] = part
        if not latest:
            raise missing[0]
        return [latest[number] for number in sorted(latest)]

    def observe(
        self, interval: float, replica: str = ""
    ) -> AsyncGenerator[scheduler_pb2.ObserveResponse, None]:
        """What a scheduler does, told every `interval` seconds until the generator is closed.

        Args:
            replica: which one; by default the first that is there.

        Raises:
            NotFound: there is no such replica.
            Unavailable: the scheduler cannot be reached, or is lost.
            PagewireError: it cannot be observed.
        """
        if replica:
            return self.named(replica).observe(interval)
        there = [link for link in self.links if link.connected] or self.links
        if not there:
            raise Unavailable(self.why_not_ready())
        return there[0].observe(interval)

    async def _answers(self, call: Callable[[SchedulerLink], Awaitable[T]]) -> list[T]:
        """The answers of those that can be reached.

        Raises:
            Unavailable: nobody can.
        """
        answers: list[T] = []
        links = [link for link in self.links if link.connected]
        error: BaseException = Unavailable(self.why_not_ready())
        for answer in await asyncio.gather(*(call(link) for link in links), return_exceptions=True):
            if isinstance(answer, PagewireError):
                error = answer
            elif isinstance(answer, BaseException):
                raise answer
            else:
                answers.append(answer)
        if not answers:
            raise error
        return answers

    # Links that come and go.

    def _add(self, address: Address) -> SchedulerLink:
        link = SchedulerLink(
            address.target,
            name=address.name,
            number=self._next_number,
            host=address.host,
            reconnect_timeout=self._reconnect_timeout,
            tls=None if address.target.startswith("unix:") else self._tls,
        )
        self._next_number += 1
        if not self._is_single:
            link.on_cache = partial(self._cache_changed, link)
            link.on_lost = partial(self._lost, link)
        link.on_change(self._changed)
        self.links.append(link)
        return link

    async def _start(self, link: SchedulerLink) -> None:
        await link.start()
        link.failed.add_done_callback(self._link_failed)

    def _link_failed(self, failed: asyncio.Future[None]) -> None:
        if not failed.cancelled() and not self.failed.done() and (error := failed.exception()) is not None:
            self.failed.set_exception(error)

    def _cache_changed(self, link: SchedulerLink, cache: scheduler_pb2.CacheChanges) -> None:
        index = self._router.index
        if cache.cleared:
            index.cleared(link.number)
        index.stored(link.number, cache.stored)
        index.removed(link.number, cache.removed)

    def _lost(self, link: SchedulerLink) -> None:
        self._router.index.cleared(link.number)
        self._move_from(link)

    def _changed(self) -> None:
        """A link has connected, was lost, or told of its engine."""
        if any(link.heard.is_set() for link in self.links):
            self._heard.set()
        if self._is_single:
            self.model = self.links[0].model
        else:
            self._compare_models()
            self._catch_up()
            for link in self.links:
                if not link.connected or link.refused:
                    self._move_from(link)
        if self.ready:
            self._has_changed.set()
        for listener in self._listeners:
            listener()

    def _compare_models(self) -> None:
        """Leaves out schedulers whose model is not that of the first one in use."""
        there = [link for link in self.links if link.ready and link.model is not None]
        agreeing = [link for link in there if not link.refused] or there
        if not agreeing:
            return
        model = agreeing[0].model
        assert model is not None
        for link in there:
            assert link.model is not None
            why = why_another_model(link.model, model)
            if why and why != link.refused:
                logger.error(
                    "scheduler %s (%s) gets no requests: %s; all schedulers behind a frontend must serve "
                    "the same model",
                    link.name,
                    link.target,
                    why,
                )
            link.refused = why
        self.model = common_facts(
            [link.model for link in there if link.model is not None and not link.refused]
        )
        if self._chains is None or self._chains.block_size != self.model.block_size:
            self._chains = RecentChains(self.model.block_size)

    async def _keep_resolving(self) -> None:
        while True:
            addresses = await self._addresses.resolve()
            if addresses is not None:
                await self._follow(addresses)
            await asyncio.sleep(RESOLVE_SECONDS)

    async def _follow(self, addresses: Iterable[Address]) -> None:
        """Connects to schedulers that are new, and leaves those that are not there any more."""
        wanted = {address.target: address for address in addresses}
        for link in list(self.links):
            if link.target not in wanted and not link.connected:
                await self._leave(link)
        known = {link.target for link in self.links}
        for target, address in wanted.items():
            if target not in known:
                logger.info("found scheduler %s", target)
                await self._start(self._add(address))

    async def _leave(self, link: SchedulerLink) -> None:
        self._move_from(link)
        if not link.num_open:  # else they wait for it, or for another one
            self.links.remove(link)
            logger.info("left scheduler %s, which is named no more", link.target)
            await link.stop()


async def _load_all(link: SchedulerLink, adapters: Sequence[scheduler_pb2.Adapter]) -> None:
    for adapter in adapters:
        try:
            await link.load_adapter(adapter.name, adapter.path, in_place=True)
        except PagewireError as error:
            logger.error(
                "scheduler %s cannot load the adapter %s: %s", link.name, adapter.name, error.message
            )


async def _within(seconds: float, awaited: Coroutine[Any, Any, Any]) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await awaited
    except TimeoutError:
        return False
    return True
