"""Requests computed in batches that begin and end together, to be compared with batching in flight.

In flight, which is the default, a waiting request is admitted as soon as it is the first and there is room
for it. With every other strategy it waits until its batch begins: no batch begins while another one is
computed, and no request joins a batch that has begun. A batch begins when nothing is computed and

- none: a request waits; the batch is this one request;
- static, dynamic: `max_num_seqs` requests wait, or one of them is overdue, which means that it has waited as
  long as it may. The two differ only in how long that is (see SchedulerConfig).

There is no clock here: the scheduler is told which requests are overdue. A batch is made of the first
requests in order of service of those that waited when it began. All of them get a row, sooner or later, and
keep their place if they are preempted, if a step fails or if the worker is lost. The parts of one client's
request (completions, beams) begin together, however many they are; parts that come later, as beams do at each
token, join the batch that is being computed.
"""

from __future__ import annotations

from collections.abc import Callable

from scheduler.policy.shares import Shares
from scheduler.policy.waiting import Order, WaitingQueue
from scheduler.request import Request, Status

_MAX_BEGUN = 4096
"""The number of clients' requests in parts whose later parts join a batch at once: the latest that began."""


class BatchQueue(WaitingQueue):
    """A waiting queue that gives out requests in batches.

    As an `Order` it holds the waiting requests of the batch that is being computed: preempted ones, and parts
    of clients' requests that have begun. The others stand in two lines.
    """

    def __init__(self, shares: Shares, batch_size: int, is_idle: Callable[[], bool]) -> None:
        """Args:
        shares: the clients' fairness accounts.
        batch_size: the number of requests in a full batch.
        is_idle: says whether no request runs and none is a suspect.
        """
        super().__init__(shares)
        self._batch_size = batch_size
        self._is_idle = is_idle
        # Requests that waited when the batch began, and those that came later.
        self._in_time, self._late = Order(self._turns), Order(self._turns)
        self._source: Order = self
        self._lines_left: list[Order] = []
        self._num_places, self._is_new = 0, False
        self._overdue: set[Request] = set()
        # Of a client's request in parts only the first part stands in line. The others, by that one:
        self._followers: dict[Request, list[Request]] = {}
        self._leaders: dict[str, Request] = {}
        self._begun: dict[str, None] = {}

    def add(self, request: Request, *, may_be_refused: bool = False) -> None:
        """See WaitingQueue.add. A request that may not be refused has waited before: it is overdue."""
        super().add(request, may_be_refused=may_be_refused)
        if not may_be_refused:
            self._overdue.add(request)

    def push(self, request: Request) -> None:
        """Adds a request to the batch if it belongs to it, and otherwise to those that come late."""
        group = request.group
        if request.num_cached_tokens >= 0 or (request.part and group in self._begun):
            super().push(request)
            return
        leader = self._leaders.get(group) if request.part else None
        if leader is not None:
            self._followers[leader].append(request)
            return
        if group:
            self._leaders[group] = request
            self._followers[request] = []
        self._late.push(request)

    def overdue(self, request: Request) -> None:
        """Lets a batch begin that is not full, because this request has waited as long as it may."""
        if request.status is Status.WAITING and request.suspicion is None:
            self._overdue.add(request)

    def first(self) -> Request | None:
        """The request to admit next: of the batch that is being computed or, if that is over, of the next
        one. None if the next one does not begin yet.
        """
        self._source = self
        request = super().first()
        if request is None:
            if not self._set_aside and self._is_idle():
                self._open()
            if self._num_places > 0:
                self._source = self._in_time
                request = self._in_time.first()
        return request

    def _open(self) -> None:
        """Begins a batch with the requests that wait, if it is full or one of them is overdue."""
        self._is_new = bool(self._overdue) or self.num_waiting >= self._batch_size
        self._num_places = self._batch_size if self._is_new else 0
        if self._is_new:
            for request in self._late.live():
                self._in_time.push(request)
            self._late.clear()

    def pop(self) -> Request:
        """Removes the request that `first` returned last."""
        return super().pop() if self._source is self else self._source.pop()

    def take_first(self) -> None:
        """Removes the request that `first` returned last. Its later parts belong to the batch as well."""
        request = self.pop()
        self._count_out(request)
        if self._source is self:
            return
        self.num_batches += self._is_new
        self._is_new = False
        self._num_places -= 1
        if not request.group:
            return
        followers = [each for each in self._followers.pop(request) if each.status is Status.WAITING]
        self._forget_leader(request)
        self._begun.pop(request.group, None)
        self._begun[request.group] = None
        if len(self._begun) > _MAX_BEGUN:
            del self._begun[next(iter(self._begun))]
        for each in followers:
            super().push(each)
        self._num_places -= len(followers)

    def _forget_leader(self, request: Request) -> None:
        if self._leaders.get(request.group) is request:
            del self._leaders[request.group]

    def set_aside(self) -> None:
        """See WaitingQueue.set_aside."""
        self._set_aside.append(self.pop())
        self._lines_left.append(self._source)

    def restore(self) -> None:
        """Puts the requests that `set_aside` skipped back where they were."""
        while self._set_aside:
            Order.push(self._lines_left.pop(), self._set_aside.pop())

    def forget(self, request: Request) -> None:
        """Stops counting a request that has just ended. The next part of the same client's request takes its
        place in line.
        """
        super().forget(request)
        for line in (self._in_time, self._late):
            line.drop_ended(self.num_waiting)
        followers = self._followers.pop(request, None)
        if followers is None:
            return
        followers = [each for each in followers if each.status is Status.WAITING]
        is_newest = self._leaders.get(request.group) is request
        self._forget_leader(request)
        if followers:
            self._followers[followers[0]] = followers[1:]
            self._late.push(followers[0])
            if is_newest:
                self._leaders[request.group] = followers[0]

    def _count_out(self, request: Request) -> None:
        super()._count_out(request)
        self._overdue.discard(request)

    def take_all(self) -> list[Request]:
        """See WaitingQueue.take_all. A batch that has begun goes on with those that are added again."""
        followers = [each for some in self._followers.values() for each in some]
        others = [each for each in followers if each.status is Status.WAITING]
        for line in (self._in_time, self._late):
            others += line.live()
            line.clear()
        for request in others:
            self._count_out(request)
        self._followers.clear()
        self._leaders.clear()
        return others + super().take_all()
