"""The waiting queue: which requests may wait, and which is admitted next."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import chain, count, islice

import numpy as np

from engine.dispatch.limits import EngineLimits
from engine.dispatch.sampling import U32
from pagewire.base.errors import InvalidRequest
from scheduler.policy.shares import Share, Shares
from scheduler.request import NO_TURN, Request, Status

_HEAP_SLACK = 64


def check(request: Request, limits: EngineLimits) -> None:
    """Checks a request against the engine's limits and lowers its `max_total_tokens` to them.

    Raises:
        InvalidRequest: the request can never be served.
    """
    token_ids = request.token_ids
    if not token_ids:
        raise InvalidRequest("the prompt is empty; send at least one token", param="prompt")
    most = limits.max_model_len - (not request.is_pooling)
    if len(token_ids) > most:
        to_generate = "" if request.is_pooling else "with at least one to generate, "
        raise InvalidRequest(
            f"the prompt has {len(token_ids)} tokens; {to_generate}this model takes at most {most}",
            param="prompt",
        )
    largest = int(np.frombuffer(token_ids, U32).max())
    if largest >= limits.vocab_size:
        raise InvalidRequest(
            f"token id {largest} is out of range; it must be below {limits.vocab_size}",
            param="prompt",
        )
    if len(token_ids) >= request.max_total_tokens:
        raise InvalidRequest("max_tokens must leave at least one token to generate", param="max_tokens")
    request.max_total_tokens = min(request.max_total_tokens, most + 1)


class Order:
    """Requests in order of service: by priority; then by how much their clients, and the clients' users, were
    served so far, least first; then those that ran before; then by arrival. Requests that end while they are
    in here are removed when they reach the front, or by `drop_ended`.
    """

    def __init__(self, turns: Iterator[int]) -> None:
        """Args:
        turns: numbers the requests that come to the front.
        """
        self._turns = turns
        self._levels: dict[int, _Level] = {}
        self._priorities: list[int] = []
        self._num_entries = 0

    def push(self, request: Request) -> None:
        """Adds a request whose `share` is set."""
        level = self._levels.get(request.priority)
        if level is None:
            level = self._levels[request.priority] = _Level()
            heapq.heappush(self._priorities, request.priority)
        level.add(request)
        self._num_entries += 1

    def first(self) -> Request | None:
        """The request to admit next; it stays in here. Assigns its turn: requests that come to the front
        later are served after it while both run.
        """
        while self._priorities:
            level = self._levels[self._priorities[0]]
            request = level.first()
            if request is not None:
                if request.turn >= NO_TURN:
                    request.turn = next(self._turns)
                return request
            del self._levels[heapq.heappop(self._priorities)]
        return None

    def pop(self) -> Request:
        """Removes the request that `first` returned last."""
        self._num_entries -= 1
        return self._levels[self._priorities[0]].pop()

    def live(self) -> list[Request]:
        """The requests that have not ended, in no order."""
        return [request for level in self._levels.values() for request in level.live()]

    def some(self, most: int) -> list[Request]:
        """Up to `most` requests that have not ended, those of the first priorities, else in no order."""
        levels = (self._levels[priority] for priority in sorted(self._levels))
        return list(islice(chain.from_iterable(level.live() for level in levels), most))

    def clear(self) -> None:
        """Removes everything."""
        self._levels, self._priorities, self._num_entries = {}, [], 0

    def drop_ended(self, num_live: int) -> None:
        """Removes the requests that ended if they make up most of what is in here.

        Args:
            num_live: no fewer than have not ended.
        """
        if self._num_entries > 2 * num_live + _HEAP_SLACK:
            live = self.live()
            self.clear()
            for request in live:
                Order.push(self, request)


class WaitingQueue(Order):
    """The waiting requests, each of which may be admitted as soon as it is the first and there is room.

    Attributes:
        num_waiting: requests in the queue that have not ended.
        num_batches: batches that were begun, where requests are computed in batches (batching.py); else 0.
    """

    def __init__(self, shares: Shares) -> None:
        """Args:
        shares: the clients' fairness accounts; the queue updates their waiting counts.
        """
        super().__init__(count())
        self.num_waiting = self.num_batches = 0
        self._shares = shares
        self._set_aside: list[Request] = []
        self._loads: dict[int, _Load] = {}
        self._refusable: dict[Share, dict[Request, None]] = {}

    def add(self, request: Request, *, may_be_refused: bool = False) -> None:
        """Adds a request.

        Args:
            request: new or preempted.
            may_be_refused: whether it may still be ended to make room for another request.
        """
        request.status = Status.WAITING
        share = request.share = self._shares.of(request.client)
        self._shares.begin_to_wait(share)
        if may_be_refused:
            self._refusable.setdefault(share, {})[request] = None
        self.num_waiting += 1
        self.push(request)
        self._count(request, 1)

    def overdue(self, request: Request) -> None:
        """Tells that a request has waited as long as it may for others. None does here."""

    def take_first(self) -> None:
        """Removes the request that `first` returned last."""
        self._count_out(self.pop())

    def set_aside(self) -> None:
        """Skips the request that `first` returned last, until `restore`; it still counts as waiting."""
        self._set_aside.append(self.pop())

    def restore(self) -> None:
        """Puts back the requests that `set_aside` skipped."""
        while self._set_aside:
            self.push(self._set_aside.pop())

    def forget(self, request: Request) -> None:
        """Stops counting a request that has just ended."""
        assert request.status is Status.ENDED
        self._count_out(request)
        self.drop_ended(self.num_waiting)

    def _count_out(self, request: Request) -> None:
        share = request.share
        assert share is not None
        self.num_waiting -= 1
        self._count(request, -1)
        self._shares.wait_no_more(share)
        refusable = self._refusable.get(share)
        if refusable is not None:
            refusable.pop(request, None)
            if not refusable:
                del self._refusable[share]

    def take_all(self) -> list[Request]:
        """Empties the queue and returns the requests that were waiting, in no order."""
        taken = self.live()
        for request in taken:
            self._count_out(request)
        self.clear()
        return taken

    def has(self, share: Share) -> bool:
        """Whether any request of a share waits."""
        return any(share in load.of_users for load in self._loads.values())

    def ahead_of(self, request: Request) -> tuple[int, int]:
        """(requests, their prompt tokens) that are likely to be served before a new request: those of its
        user, and as many of every other user that has requests waiting.
        """
        share = self._shares.of(request.client)
        loads = [load for priority, load in self._loads.items() if priority <= request.priority]
        num_requests = sum(load.num_requests for load in loads)
        if not num_requests:
            return 0, 0
        num_own = sum(load.of_users.get(share, 0) for load in loads)
        num_parties = self._shares.num_parties(share)
        num_ahead = min(num_requests, num_own * num_parties + num_parties - 1)
        num_tokens = sum(load.num_tokens for load in loads)
        return num_ahead, num_tokens * num_ahead // num_requests

    def _count(self, request: Request, change: int) -> None:
        load = self._loads.setdefault(request.priority, _Load())
        load.count(request, change)
        if not load.num_requests:
            del self._loads[request.priority]

    def to_be_refused(self, share: Share) -> Request | None:
        """The request to end to make room for one of `share`: the newest request of the user with the most
        waiting, of the client with the most waiting. None if `share` would then have the most, or if none of
        that user's requests may be refused any more.
        """
        most = self._shares.most_waiting(share)
        refusable = self._refusable.get(most) if most is not None else None
        return next(reversed(refusable)) if refusable else None


class _Load:
    """The number of waiting requests and prompt tokens of one priority."""

    def __init__(self) -> None:
        self.num_requests = self.num_tokens = 0
        self.of_users: dict[Share, int] = {}

    def count(self, request: Request, change: int) -> None:
        user = request.share
        assert user is not None
        self.num_requests += change
        self.num_tokens += change * request.num_prompt_tokens
        count = self.of_users.pop(user, 0) + change
        if count:
            self.of_users[user] = count


class _Level:
    """The waiting requests of one priority: heaps of clients, of their users, and of the users' requests."""

    def __init__(self) -> None:
        self._clients = _LeastServed()
        self._users: dict[Share, _LeastServed] = {}
        self._queues: dict[Share, list[tuple[tuple[int, int], Request]]] = {}

    def add(self, request: Request) -> None:
        user = request.share
        assert user is not None
        queue = self._queues.get(user)
        if queue is None:
            queue = self._queues[user] = []
            client = user.client
            users = self._users.get(client)
            if users is None:
                users = self._users[client] = _LeastServed()
                self._clients.add(client)
            users.add(user)
        heapq.heappush(queue, (request.order, request))

    def first(self) -> Request | None:
        while (client := self._clients.first()) is not None:
            users = self._users[client]
            while (user := users.first()) is not None:
                if _drop_ended(self._queues[user]):
                    return self._queues[user][0][1]
                users.pop()
                del self._queues[user]
            self._clients.pop()
            del self._users[client]
        return None

    def pop(self) -> Request:
        """Removes the request that `first` has just returned."""
        client = self._clients.top
        return heapq.heappop(self._queues[self._users[client].top])[1]

    def live(self) -> Iterator[Request]:
        """The requests that have not ended."""
        for queue in self._queues.values():
            for _, request in queue:
                if request.status is Status.WAITING:
                    yield request


def _drop_ended(queue: list[tuple[tuple[int, int], Request]]) -> bool:
    """Removes ended requests from the front of a heap. Returns whether a request is left."""
    while queue and queue[0][1].status is Status.ENDED:
        heapq.heappop(queue)
    return bool(queue)


class _LeastServed:
    """A heap of shares by service received, which may grow while they are in it."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Share]] = []
        self._num_added = 0

    @property
    def top(self) -> Share:
        """The share that `first` returned last."""
        return self._heap[0][2]

    def add(self, share: Share) -> None:
        heapq.heappush(self._heap, (share.served, self._num_added, share))
        self._num_added += 1

    def first(self) -> Share | None:
        """The share that was served the least; it stays in the heap. None if the heap is empty."""
        heap = self._heap
        while heap:
            served, number, share = heap[0]
            if served == share.served:
                return share
            heapq.heapreplace(heap, (share.served, number, share))
        return None

    def pop(self) -> None:
        heapq.heappop(self._heap)
