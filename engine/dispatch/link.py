"""A scheduler's end of dispatch: the handshake with all ranks of a group, plans to all, results of each.

One ring of plans, which every rank reads with a cursor of its own, and a ring of results for each. See
control.py for the handshake, and for the worker's end.
"""

from __future__ import annotations

import os
import secrets
import select
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Self

from engine.dispatch.control import (
    HANDSHAKE_SECONDS,
    HandshakeError,
    HandshakeTimeout,
    WorkerGone,
    WorkerSilent,
    check_version,
    close_fds,
    facts_of,
    limits_message,
    rank_socket,
    receive,
    ring_slots,
    send,
)
from engine.dispatch.facts import WorkerFacts
from engine.dispatch.limits import EngineLimits
from engine.dispatch.peer import PeerProcess
from engine.dispatch.records import (
    DISPATCH_VERSION,
    StepPlan,
    StepResult,
    decode_result,
    encode_plan,
    plan_bytes,
    result_bytes,
)
from engine.dispatch.ring import Ring, RingShape, RingWriter
from engine.dispatch.signals import SignalledReader
from pagewire.worker.v1 import worker_pb2 as pb

# Ranks meet: processes connect to each other, and libraries set communication up.
MEETING_SECONDS = 60.0


class OtherWorldSize(HandshakeError):
    """The group has another number of ranks than the scheduler took it for.

    Attributes:
        world_size: how many it has.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__(f"the group has {world_size} ranks")
        self.world_size = world_size


class Rank:
    """One rank's process as its scheduler sees it.

    Attributes:
        facts: what it said of itself.
        worker_pid: the id that it gives itself.
        process: it as seen from here.
        control_fd: readable once it is gone.
        result_fd: readable when it has written a result.
        results: reads them.
    """

    def __init__(self, path: Path, timeout: float, number: int = 0) -> None:
        """Connects.

        Args:
            path: of its socket.
            number: the rank that is expected there.
            timeout: seconds for each of its answers.

        Raises:
            OSError: nobody listens there (yet).
            TimeoutError: it has left many connections waiting.
        """
        self._number = number
        self._fds: list[int] = []
        self._ring: Ring | None = None
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            self._sock.settimeout(timeout)
            self._sock.connect(str(path))
            self.process = PeerProcess(self._sock)
        except BaseException:
            self._sock.close()
            raise
        self.control_fd = self._sock.fileno()

    def introduce(self) -> None:
        """Learns what the rank is.

        Raises:
            WorkerSilent: it does not answer.
            HandshakeError: it cannot work with this scheduler.
            OSError: it left.
        """
        send(self._sock, "hello", pb.Hello(dispatch_version=DISPATCH_VERSION, pid=os.getpid()))
        welcome = self._answer("welcome").welcome
        check_version(welcome.dispatch_version)
        self.facts, self.worker_pid = facts_of(welcome), welcome.pid

    def offer(self, plans: Ring, limits: EngineLimits, rendezvous: str) -> None:
        """Sends it all that it needs to attach."""
        self._ring = Ring.create(RingShape(result_bytes(limits), ring_slots(self.facts.num_stages)))
        self._fds += [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
        self.plan_fd, self.result_fd = self._fds
        self.results = SignalledReader(self._ring, 0, self.result_fd)
        attach = pb.Attach(
            plan_ring=plans.name,
            plan_reader=self.facts.rank,
            result_ring=self._ring.name,
            limits=limits_message(limits),
            rendezvous=rendezvous,
        )
        send(self._sock, "attach", attach, fds=(self.plan_fd, self.result_fd))

    def confirm(self) -> None:
        """Waits until it has attached, and met the others; raises as `introduce`."""
        if self.facts.world_size > 1:
            self._sock.settimeout(MEETING_SECONDS)
        self._answer("attached")
        self._sock.setblocking(False)

    def _answer(self, kind: str) -> pb.Control:
        try:
            return receive(self._sock, kind)[0]
        except HandshakeTimeout as error:
            raise WorkerSilent(str(error), self.process, self._number) from error

    def refuse(self, reason: str) -> None:
        """Tells it why it is left."""
        send(self._sock, "refused", pb.Refused(reason=reason))

    def forget_name(self) -> None:
        """Removes the name of its ring, which is mapped by now or never will be."""
        if self._ring is not None:
            self._ring.unlink()

    def leave(self) -> None:
        """Closes what it shares with this process, which it notices. `process` stays."""
        self._sock.close()
        if self._ring is not None:
            self._ring.close()
        close_fds(self._fds)

    def close(self) -> None:
        """Leaves it and lets go of its process."""
        self.leave()
        self.process.close()

    def __str__(self) -> str:
        return f"rank {self.facts.rank} (pid {self.process.pid or self.worker_pid}, {self.facts.device})"


class WorkerLink:
    """A scheduler's attachment to the ranks of a group, often only one.

    Attributes:
        facts: of the first rank, with the limits that all have agreed on.
        ranks: all of them, in order.
        worker_pid, process, control_fd, result_fd: of the first rank.
    """

    def __init__(self, ranks: Sequence[Rank], facts: WorkerFacts, plans: Ring, rendezvous: str) -> None:
        self.facts, self.ranks = facts, tuple(ranks)
        first = ranks[0]
        self.worker_pid, self.process = first.worker_pid, first.process
        self.control_fd, self.result_fd = first.control_fd, first.result_fd
        self._plans, self._writer = plans, RingWriter(plans)
        self._plan_fds = tuple(rank.plan_fd for rank in ranks)
        self._reads = tuple(rank.results.read for rank in ranks)
        self._rendezvous = rendezvous
        self._poll = select.poll()
        for rank in ranks:
            self._poll.register(rank.result_fd, select.POLLIN)
            self._poll.register(rank.control_fd, select.POLLIN)

    @classmethod
    def connect(cls, path: Path, timeout: float | None = None, *, world_size: int = 1) -> Self:
        """Connects to the workers listening on `path` and beside it, and attaches to them.

        Args:
            path: of the first rank's socket.
            timeout: seconds for each of their answers, HANDSHAKE_SECONDS at most.
            world_size: how many ranks there are.

        Raises:
            OSError: one of them does not listen (yet), or left during the handshake.
            TimeoutError: one has left many connections waiting.
            WorkerSilent: one does not answer.
            OtherWorldSize: there are more ranks, or fewer.
            HandshakeError: they cannot work with this scheduler, or with each other.
        """
        seconds = HANDSHAKE_SECONDS if timeout is None else min(timeout, HANDSHAKE_SECONDS)
        with ExitStack() as left:
            ranks: list[Rank] = []
            for number in range(world_size):
                ranks.append(Rank(rank_socket(path, number), seconds, number))
                left.callback(ranks[-1].leave)
            try:
                link = cls._attach(path, ranks)
            except BaseException as error:
                silent = error.process if isinstance(error, WorkerSilent) else None
                for rank in ranks:
                    if rank.process is not silent:  # which belongs to whoever catches the error
                        rank.process.close()
                raise
            left.pop_all()
        return link

    @classmethod
    def _attach(cls, path: Path, ranks: list[Rank]) -> Self:
        for rank in ranks:
            rank.introduce()
        facts = _agree(ranks)
        limits = facts.limits
        rendezvous = f"{path}.group-{secrets.token_hex(8)}" if len(ranks) > 1 else ""
        plans = Ring.create(RingShape(plan_bytes(limits), ring_slots(facts.num_stages), len(ranks)))
        try:
            for rank in ranks:
                rank.offer(plans, limits, rendezvous)
            for rank in ranks:
                rank.confirm()
        except BaseException:
            plans.close()
            _remove(rendezvous)
            raise
        finally:
            plans.unlink()
            for rank in ranks:
                rank.forget_name()
        return cls(ranks, facts, plans, rendezvous)

    def send_plan(self, plan: StepPlan) -> None:
        """Publishes a plan and wakes every rank."""
        self._writer.write(encode_plan(plan))
        for fd in self._plan_fds:
            os.eventfd_write(fd, 1)

    def poll_result(self, rank: int = 0) -> StepResult | None:
        """A rank's next result if one is there.

        Raises:
            RecordError, RingError: the worker wrote something malformed.
        """
        record = self._reads[rank]()
        return None if record is None else decode_result(record)

    def clear(self) -> None:
        """Takes the signals of every rank's `result_fd`; read all results afterwards."""
        for rank in self.ranks:
            rank.results.take_signals()

    def wait_result(self, timeout: float | None = None) -> StepResult | None:
        """The first rank's next result, waiting up to `timeout` seconds (None: for ever) for any signal; None
        when it did not come.

        Raises:
            WorkerGone: a worker is gone.
        """
        result = self.poll_result()
        if result is not None:
            return result
        self.wait(timeout)
        return self.poll_result()

    def wait(self, timeout: float | None = None) -> None:
        """Blocks until a rank has signalled, or for `timeout` seconds.

        Raises:
            WorkerGone: a worker is gone, and none has signalled.
        """
        ready = dict(self._poll.poll(None if timeout is None else timeout * 1000))
        signalled = [rank for rank in self.ranks if rank.result_fd in ready]
        for rank in signalled:
            rank.results.take_signals()
        if ready and not signalled:
            raise WorkerGone("the control socket closed")

    def close(self) -> None:
        """Leaves the workers, which keep their weights and wait for the next scheduler."""
        for rank in self.ranks:
            rank.close()
        self._plans.close()
        _remove(self._rendezvous)


def _agree(ranks: list[Rank]) -> WorkerFacts:
    """The first rank's facts, with the limits that all can keep.

    Raises:
        OtherWorldSize: there are more ranks, or fewer.
        HandshakeError: they do not belong together; each is told why.
    """
    facts = [rank.facts for rank in ranks]
    if facts[0].world_size != len(ranks):
        raise OtherWorldSize(facts[0].world_size)
    try:
        for number, each in enumerate(facts):
            if (each.rank, each.world_size) != (number, len(ranks)):
                raise ValueError(
                    f"the worker at the socket of rank {number} of {len(ranks)} says that it is rank "
                    f"{each.rank} of {each.world_size}"
                )
        for name in ("fingerprint", "dtype", "eos_token_ids", "num_stages"):
            values = [getattr(each, name) for each in facts]
            if any(value != values[0] for value in values):
                raise ValueError(f"workers of one group differ in {name}: {values}")
        return replace(
            facts[0],
            device=_devices(facts),
            limits=EngineLimits.agree([each.limits for each in facts]),
            more_ahead=any(each.more_ahead for each in facts),
            adapters=tuple(
                adapter
                for adapter in facts[0].adapters
                if all(adapter in other.adapters for other in facts[1:])
            ),
        )
    except ValueError as error:
        for rank in ranks:
            rank.refuse(str(error))
        raise HandshakeError(str(error)) from error


def _devices(facts: Sequence[WorkerFacts]) -> str:
    """Where all ranks run, such as "cuda:0 NVIDIA H200, cuda:1 NVIDIA H200 (tp 2)"."""
    if len(facts) == 1:
        return facts[0].device
    stages = facts[0].num_stages
    sizes = [f"{name} {size}" for name, size in (("tp", len(facts) // stages), ("pp", stages)) if size > 1]
    return f"{', '.join(each.device for each in facts)} ({', '.join(sizes)})"


def _remove(rendezvous: str) -> None:
    if rendezvous:
        Path(rendezvous).unlink(missing_ok=True)
