"""The control socket between scheduler and worker: handshake, wake-ups and liveness.

The worker listens, the scheduler connects. Handshake: Hello, Welcome (the worker's facts), Attach (names of
the two rings, with two eventfds as ancillary data), Attached. The scheduler creates rings and eventfds and
unlinks the rings' names when the worker has mapped them. After that the socket is silent; it becoming
readable means the peer is gone.

Each side signals the other's eventfd after every record it writes and waits for its own together with the
socket, so nobody polls and an idle pair costs nothing.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from engine.dispatch.facts import WorkerFacts
from engine.dispatch.limits import EngineLimits
from engine.dispatch.peer import PeerProcess
from engine.dispatch.records import (
    DISPATCH_VERSION,
    StepPlan,
    StepResult,
    decode_plan,
    decode_result,
    encode_plan,
    encode_result,
    plan_bytes,
    result_bytes,
)
from engine.dispatch.ring import Ring, RingError, RingMemoryError, RingReader, RingShape, RingWriter
from engine.dispatch.sampling import u32
from pagewire.worker.v1 import worker_pb2 as pb

logger = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 10.0
MAX_STEPS_IN_FLIGHT = 2
RING_SLOTS = 2 * MAX_STEPS_IN_FLIGHT
# A worker's first steps may compile and load what later ones find.
NUM_FIRST_STEPS = 16
_MAX_PACKET = 1 << 16


def is_warm(path: Path) -> bool:
    """Whether the worker that listens on `path` has computed NUM_FIRST_STEPS. It need not answer for that."""
    return _warm_path(path).exists()


def _warm_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.warm")


class PeerGone(ConnectionError):
    """The other process closed its end of the control socket, or died."""


class SchedulerGone(PeerGone):
    """The scheduler is gone: keep the weights, drop the KV content, wait for the next one."""


class WorkerGone(PeerGone):
    """The worker is gone: every plan in flight is lost."""


class HandshakeError(ConnectionError):
    """The peer answered, but the two cannot work together."""


class HandshakeTimeout(HandshakeError):
    """The peer did not answer in time."""


class WorkerSilent(HandshakeTimeout):
    """A worker takes connections and does not answer: it is busy, or hangs.

    Attributes:
        process: which; it belongs to whoever catches this.
    """

    def __init__(self, message: str, process: PeerProcess) -> None:
        super().__init__(message)
        self.process = process


def _send(sock: socket.socket, kind: str, message: object, fds: tuple[int, ...] = ()) -> None:
    packet = pb.Control(**{kind: message}).SerializeToString()  # type: ignore[arg-type]
    if fds:
        socket.send_fds(sock, [packet], list(fds))
    else:
        sock.send(packet)


def _receive(sock: socket.socket, expected: str, num_fds: int = 0) -> tuple[pb.Control, list[int]]:
    """The next handshake message, which must be of the expected kind.

    Raises:
        HandshakeError: it is another, malformed, late (HandshakeTimeout), or the peer refused.
        PeerGone: the peer closed the socket.
    """
    try:
        packet, fds, _, _ = socket.recv_fds(sock, _MAX_PACKET, num_fds)
    except TimeoutError:
        seconds = sock.gettimeout() or 0.0
        raise HandshakeTimeout(f"no {expected} within {seconds:g} s; is the peer busy?") from None
    try:
        if not packet:
            raise PeerGone(f"the peer closed the control socket before {expected}")
        message = pb.Control.FromString(packet)
        kind = message.WhichOneof("message")
        if kind == "refused":
            raise HandshakeError(message.refused.reason)
        if kind != expected or len(fds) != num_fds:
            raise HandshakeError(
                f"expected {expected} with {num_fds} file descriptors, got {kind} with {len(fds)}"
            )
    except DecodeError as error:
        _close_fds(fds)
        raise HandshakeError(f"malformed handshake message: {error}") from error
    except BaseException:
        _close_fds(fds)
        raise
    return message, fds


def _close_fds(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _check_version(version: int) -> None:
    if version != DISPATCH_VERSION:
        raise HandshakeError(
            f"the peer speaks dispatch version {version}, this process {DISPATCH_VERSION}; "
            "run the same release of both"
        )


class _Channel:
    """What both ends have after the handshake: a socket for liveness, a ring each way, two eventfds."""

    def __init__(
        self, sock: socket.socket, outgoing: Ring, incoming: Ring, reader: int, fds: list[int]
    ) -> None:
        self._sock = sock
        self._rings = (outgoing, incoming)
        self._writer = RingWriter(outgoing)
        self._reader = RingReader(incoming, reader)
        self._signal_fd, self._wait_fd = fds
        self._poll = select.poll()
        self._poll.register(self._wait_fd, select.POLLIN)
        self._poll.register(sock, select.POLLIN)
        sock.setblocking(False)

    def send(self, record: bytes) -> None:
        self._writer.write(record)
        os.eventfd_write(self._signal_fd, 1)

    def receive(self) -> bytes | None:
        """The next record if one is there. Does not touch the eventfd."""
        return self._reader.read()

    def wait(self, timeout: float | None) -> None:
        """Blocks until the other side has signalled, or for `timeout` seconds.

        Raises:
            PeerGone: the control socket closed.
        """
        ready = dict(self._poll.poll(None if timeout is None else timeout * 1000))
        if self._wait_fd in ready:
            self.clear()
        elif self._sock.fileno() in ready:
            raise PeerGone("the control socket closed")

    def clear(self) -> None:
        """Takes the signals so far, so that the eventfd is quiet until the next one."""
        try:
            os.eventfd_read(self._wait_fd)
        except BlockingIOError:
            return  # quiet already

    def close(self) -> None:
        self._sock.close()
        for ring in self._rings:
            ring.close()
        _close_fds([self._signal_fd, self._wait_fd])


class WorkerEndpoint:
    """A worker's listening control socket.

    Args:
        path: where to listen; a socket that nobody listens on any more is replaced. Mode 0600. A file beside
            it says once the worker is warm; see `is_warm`.

    Raises:
        OSError: the path cannot be bound, or another worker is listening on it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._num_results = 0
        _remove_stale_socket(path)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            self._sock.bind(str(path))
            path.chmod(0o600)
            _warm_path(path).unlink(missing_ok=True)
            self._sock.listen(8)
        except BaseException:
            self._sock.close()
            raise

    def accept(self, facts: WorkerFacts) -> WorkerSession:
        """Waits for a scheduler with which the handshake succeeds; a failed one is logged and refused."""
        while True:
            sock, _ = self._sock.accept()
            try:
                channel, scheduler_pid = _worker_handshake(sock, facts)
                return WorkerSession(channel, scheduler_pid, self._count_result)
            except (HandshakeError, RingError, OSError) as error:
                logger.warning("handshake with a scheduler failed: %s", error)
                with suppress(OSError):
                    _send(sock, "refused", pb.Refused(reason=str(error)))
                sock.close()
            except BaseException:
                sock.close()
                raise

    def _count_result(self) -> None:
        self._num_results += 1
        if self._num_results == NUM_FIRST_STEPS:
            try:
                _warm_path(self.path).touch(mode=0o600)
            except OSError as error:  # a scheduler gives it more time than it needs, and that is all
                logger.warning("cannot say beside %s that this worker is warm: %s", self.path, error)

    def close(self) -> None:
        """Stops listening and removes the socket's path."""
        self._sock.close()
        for path in (_warm_path(self.path), self.path):
            path.unlink(missing_ok=True)


def _remove_stale_socket(path: Path) -> None:
    """Removes a socket file that a dead process left; leaves anything else for bind() to complain about."""
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)


def _worker_handshake(sock: socket.socket, facts: WorkerFacts) -> tuple[_Channel, int]:
    """The way to the scheduler, and its pid."""
    sock.settimeout(HANDSHAKE_SECONDS)
    hello = _receive(sock, "hello")[0].hello
    _check_version(hello.dispatch_version)
    welcome = pb.Welcome(dispatch_version=DISPATCH_VERSION, pid=os.getpid(), **_fields(facts))
    _send(sock, "welcome", welcome)
    message, fds = _receive(sock, "attach", num_fds=2)
    attach = message.attach
    plan_fd, result_fd = fds
    rings: list[Ring] = []
    try:
        rings += [Ring.open(attach.plan_ring), Ring.open(attach.result_ring)]
        plans, results = rings
        needed = result_bytes(facts.limits)
        if results.shape.slot_bytes < needed:
            raise HandshakeError(
                f"result slots of {results.shape.slot_bytes} bytes; this worker needs {needed}"
            )
        _send(sock, "attached", pb.Attached())
        channel = _Channel(sock, results, plans, attach.plan_reader, [result_fd, plan_fd])
    except BaseException:
        _close_fds(fds)
        for ring in rings:
            ring.close()
        raise
    return channel, hello.pid


class WorkerSession:
    """A worker's attachment to one scheduler."""

    def __init__(self, channel: _Channel, scheduler_pid: int, on_result: Callable[[], None]) -> None:
        """Args:
        channel: to it.
        scheduler_pid: its id.
        on_result: called after every result.
        """
        self._channel = channel
        self.scheduler_pid = scheduler_pid
        self._on_result = on_result

    def next_plan(self, *, block: bool) -> StepPlan | None:
        """The next plan; None if none is there and `block` is false.

        Raises:
            SchedulerGone: the scheduler is gone (plans it left behind are not worth computing).
            RecordError: the plan is malformed.
        """
        record = self._channel.receive()
        while record is None and block:
            try:
                self._channel.wait(None)
            except PeerGone as error:
                raise SchedulerGone(str(error)) from None
            record = self._channel.receive()
        return None if record is None else decode_plan(record)

    def check(self) -> None:
        """Raises:
        SchedulerGone: the scheduler is gone.
        """
        try:
            self._channel.wait(0)
        except PeerGone as error:
            raise SchedulerGone(str(error)) from None

    def send_result(self, result: StepResult) -> None:
        """Publishes a result, or that there was no shared memory for it, and wakes the scheduler."""
        try:
            self._channel.send(encode_result(result))
        except RingMemoryError as error:
            self._channel.send(encode_result(StepResult(result.step_id, u32([]), error=str(error))))
        self._on_result()

    def close(self) -> None:
        """Leaves the scheduler; it sees the socket close."""
        self._channel.close()


class WorkerLink:
    """A scheduler's attachment to one worker.

    `facts` are the worker's, and `worker_pid` the id that it gives itself; `process` is it as seen from here.
    `result_fd` and `control_fd` are readable when a result has come and when the worker is gone, for an event
    loop to watch.
    """

    def __init__(self, channel: _Channel, facts: WorkerFacts, worker_pid: int, process: PeerProcess) -> None:
        self._channel = channel
        self.facts = facts
        self.worker_pid = worker_pid
        self.process = process
        self.result_fd = channel._wait_fd
        self.control_fd = channel._sock.fileno()

    @classmethod
    def connect(cls, path: Path, timeout: float | None = None) -> WorkerLink:
        """Connects to the worker listening on `path` and attaches to it.

        Args:
            path: of its socket.
            timeout: seconds for each of its answers, HANDSHAKE_SECONDS at most.

        Raises:
            OSError: nobody listens there (yet), or the worker left during the handshake.
            TimeoutError: it has left many connections waiting.
            WorkerSilent: it does not answer.
            HandshakeError: it cannot work with this scheduler.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(HANDSHAKE_SECONDS if timeout is None else min(timeout, HANDSHAKE_SECONDS))
            sock.connect(str(path))
            process = PeerProcess(sock)
            try:
                return cls._attach(sock, process)
            except HandshakeTimeout as error:
                raise WorkerSilent(str(error), process) from error
            except BaseException:
                process.close()
                raise
        except BaseException:
            sock.close()
            raise

    @classmethod
    def _attach(cls, sock: socket.socket, process: PeerProcess) -> WorkerLink:
        _send(sock, "hello", pb.Hello(dispatch_version=DISPATCH_VERSION, pid=os.getpid()))
        welcome = _receive(sock, "welcome")[0].welcome
        _check_version(welcome.dispatch_version)
        facts = _facts(welcome)
        limits = facts.limits
        rings: list[Ring] = []
        fds: list[int] = []
        try:
            rings.append(Ring.create(RingShape(plan_bytes(limits), RING_SLOTS, facts.world_size)))
            rings.append(Ring.create(RingShape(result_bytes(limits), RING_SLOTS)))
            plans, results = rings
            fds += [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
            attach = pb.Attach(plan_ring=plans.name, plan_reader=facts.rank, result_ring=results.name)
            _send(sock, "attach", attach, fds=(fds[0], fds[1]))
            _receive(sock, "attached")
            channel = _Channel(sock, plans, results, 0, fds)
        except BaseException:
            _close_fds(fds)
            for ring in rings:
                ring.close()
            raise
        finally:
            for ring in rings:
                ring.unlink()
        return cls(channel, facts, welcome.pid, process)

    def send_plan(self, plan: StepPlan) -> None:
        """Publishes a plan and wakes the worker."""
        self._channel.send(encode_plan(plan))

    def poll_result(self) -> StepResult | None:
        """The next result if one is there. Call `clear` first when `result_fd` became readable.

        Raises:
            RecordError, RingError: the worker wrote something malformed.
        """
        record = self._channel.receive()
        return None if record is None else decode_result(record)

    def clear(self) -> None:
        """Takes the signals of `result_fd`; read all results afterwards."""
        self._channel.clear()

    def wait_result(self, timeout: float | None = None) -> StepResult | None:
        """The next result, waiting up to `timeout` seconds (None: for ever); None when it did not come.

        Raises:
            WorkerGone: the worker is gone.
        """
        result = self.poll_result()
        if result is not None:
            return result
        try:
            self._channel.wait(timeout)
        except PeerGone as error:
            raise WorkerGone(str(error)) from None
        return self.poll_result()

    def close(self) -> None:
        """Leaves the worker, which keeps its weights and waits for the next scheduler."""
        self._channel.close()
        self.process.close()


_LIMITS = tuple(each.name for each in fields(EngineLimits) if each.init)


def _fields(facts: WorkerFacts) -> dict[str, Any]:
    """The facts as fields of Welcome, where limits are not in a message of their own."""
    values = asdict(facts)
    limits = values.pop("limits")
    return {**values, **{name: limits[name] for name in _LIMITS}}


def _facts(welcome: pb.Welcome) -> WorkerFacts:
    """Raises:
    HandshakeError: the limits contradict each other.
    """
    try:
        limits = EngineLimits(**{name: getattr(welcome, name) for name in _LIMITS})
    except ValueError as error:
        raise HandshakeError(f"a worker whose limits cannot be: {error}") from error
    return WorkerFacts(
        model=welcome.model,
        limits=limits,
        eos_token_ids=tuple(welcome.eos_token_ids),
        dtype=welcome.dtype,
        device=welcome.device,
        rank=welcome.rank,
        world_size=welcome.world_size,
    )
