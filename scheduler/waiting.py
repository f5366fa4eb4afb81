"""The requests that wait for a row: who may, and who is next."""

from __future__ import annotations

import heapq

import numpy as np

from engine.dispatch.records import U32
from pagewire.errors import InvalidRequest, Overloaded
from scheduler.limits import SchedulerLimits
from scheduler.request import Request, Status

_HEAP_SLACK = 64


def check(request: Request, limits: SchedulerLimits) -> None:
    """Checks a request against the limits, and cuts its max_total_tokens to them.

    Raises:
        InvalidRequest: it could never be served.
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


class WaitingQueue:
    """Requests in order of service. Those that ended while they waited stay until they surface, or until they
    are most of it.

    Attributes:
        num_waiting: requests in it that have not ended.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Request]] = []
        self.num_waiting = 0

    def check_room(self, max_num_waiting: int) -> None:
        """Raises:
        Overloaded: so many wait already.
        """
        if self.num_waiting >= max_num_waiting:
            raise Overloaded(
                f"{self.num_waiting} requests are waiting, the most this server queues; try again later"
            )

    def add(self, request: Request) -> None:
        """Has a request wait."""
        request.status = Status.WAITING
        heapq.heappush(self._heap, (request.priority, request.arrival, request))
        self.num_waiting += 1

    def first(self) -> Request | None:
        """The request to be served first, which stays."""
        heap = self._heap
        while heap:
            request = heap[0][2]
            if request.status is not Status.ENDED:
                return request
            heapq.heappop(heap)
        return None

    def take_first(self) -> None:
        """Takes out what `first` returned last."""
        heapq.heappop(self._heap)
        self.num_waiting -= 1

    def forget(self, request: Request) -> None:
        """Counts out a request that has just ended."""
        assert request.status is Status.ENDED
        self.num_waiting -= 1
        if len(self._heap) > 2 * self.num_waiting + _HEAP_SLACK:
            self._heap = [entry for entry in self._heap if entry[2].status is Status.WAITING]
            heapq.heapify(self._heap)

    def waiting(self) -> list[Request]:
        """All of them, in no order."""
        return [request for _, _, request in self._heap if request.status is Status.WAITING]
