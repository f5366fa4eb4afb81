"""The control socket between scheduler and worker, as the worker has it: handshake, wake-ups and liveness.

The worker listens, the scheduler connects (link.py). Handshake: Hello, Welcome (the worker's facts), Attach
(names of the two rings, with two eventfds as ancillary data), Attached. The scheduler creates rings and
eventfds and unlinks the rings' names when the worker has mapped them. After that the socket is silent; it
becoming readable means the peer is gone.

Each side signals the other's eventfd after every record it writes and waits for its own together with the
socket, so nobody polls and an idle pair costs nothing.

Workers that share a model are the ranks of a group. Each listens on a socket of its own, and all read the
same ring of plans, each with a cursor of its own.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import select
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path

from google.protobuf.message import DecodeError

from engine.dispatch.adapters import AdapterFacts
from engine.dispatch.facts import WorkerFacts
from engine.dispatch.limits import EngineLimits
from engine.dispatch.peer import PeerProcess
from engine.dispatch.records import (
    DISPATCH_VERSION,
    StepPlan,
    StepResult,
    decode_plan,
    encode_result,
    result_bytes,
)
from engine.dispatch.ring import Ring, RingError, RingMemoryError, RingWriter
from engine.dispatch.sampling import u32
from engine.dispatch.signals import SignalledReader
from pagewire.worker.v1 import worker_pb2 as pb

logger = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 10.0
# With one pipeline stage; see `steps_in_flight` and `ring_slots`.
MAX_STEPS_IN_FLIGHT = 2
RING_SLOTS = 2 * MAX_STEPS_IN_FLIGHT
# A worker's first steps may compile and load what later ones find.
NUM_FIRST_STEPS = 16
# The step of every plan with `work_ahead`: it is none of those that are counted.
WORK_AHEAD_STEP = 2**64 - 1
# The step of every plan with an adapter command.
ADAPTER_STEP = 2**64 - 2
_MAX_PACKET = 1 << 16

# Makes the worker one of a group; told where the ranks find each other.
Join = Callable[[str], None]


def steps_in_flight(num_stages: int) -> int:
    """How many steps there are at once at most: one in every pipeline stage, and the next."""
    return num_stages + 1


def ring_slots(num_stages: int) -> int:
    """Records that a ring of plans or results has room for: those of the steps in flight, and as many pieces
    of work ahead."""
    return 2 * steps_in_flight(num_stages)


def rank_socket(path: Path, rank: int) -> Path:
    """Where a rank of the group at `path` listens: the first there, the others beside it."""
    return path if rank == 0 else path.with_name(f"{path.name}.{rank}")


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
    """A worker is gone: every plan in flight is lost."""


class HandshakeError(ConnectionError):
    """The peer answered, but the two cannot work together."""


class HandshakeTimeout(HandshakeError):
    """The peer did not answer in time."""


class WorkerSilent(HandshakeTimeout):
    """A worker takes connections and does not answer: it is busy, or hangs.

    Attributes:
        process: which; it belongs to whoever catches this.
        rank: its place, as its socket says.
    """

    def __init__(self, message: str, process: PeerProcess, rank: int = 0) -> None:
        super().__init__(message)
        self.process, self.rank = process, rank


def send(sock: socket.socket, kind: str, message: object, fds: tuple[int, ...] = ()) -> None:
    """Sends a handshake message."""
    packet = pb.Control(**{kind: message}).SerializeToString()  # type: ignore[arg-type]
    if fds:
        socket.send_fds(sock, [packet], list(fds))
    else:
        sock.send(packet)


def receive(sock: socket.socket, expected: str, num_fds: int = 0) -> tuple[pb.Control, list[int]]:
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
        close_fds(fds)
        raise HandshakeError(f"malformed handshake message: {error}") from error
    except BaseException:
        close_fds(fds)
        raise
    return message, fds


def close_fds(fds: list[int]) -> None:
    """Closes them all."""
    for fd in fds:
        os.close(fd)


def check_version(version: int) -> None:
    """Raises:
    HandshakeError: the peer speaks another version.
    """
    if version != DISPATCH_VERSION:
        raise HandshakeError(
            f"the peer speaks dispatch version {version}, this process {DISPATCH_VERSION}; "
            "run the same release of both"
        )


class _Channel:
    """What a worker has after the handshake: a socket for liveness, a ring each way, two eventfds.

    Args:
        sock: to the scheduler.
        results, plans: the rings.
        reader: the read cursor in the ring of plans that is this worker's.
        fds: the eventfd that says that a result is there, and the one that says that a plan is.
    """

    def __init__(self, sock: socket.socket, results: Ring, plans: Ring, reader: int, fds: list[int]) -> None:
        self.sock = sock
        self._rings = (results, plans)
        self._writer = RingWriter(results)
        self._signal_fd, self._wait_fd = fds
        self._reader = SignalledReader(plans, reader, self._wait_fd)
        self._poll = select.poll()
        self._poll.register(self._wait_fd, select.POLLIN)
        self._poll.register(sock, select.POLLIN)
        sock.setblocking(False)

    def send(self, record: bytes) -> None:
        self._writer.write(record)
        os.eventfd_write(self._signal_fd, 1)

    def receive(self) -> bytes | None:
        """The next record if one is there."""
        return self._reader.read()

    def wait(self) -> None:
        """Blocks until the other side has signalled.

        Raises:
            PeerGone: the control socket closed.
        """
        ready = dict(self._poll.poll())
        if self._wait_fd in ready:
            self._reader.take_signals()
        elif self.sock.fileno() in ready:
            raise PeerGone("the control socket closed")

    def close(self) -> None:
        self.sock.close()
        for ring in self._rings:
            ring.close()
        close_fds([self._signal_fd, self._wait_fd])


class WorkerEndpoint:
    """A worker's listening control socket.

    Args:
        path: where to listen; a socket that nobody listens on any more is replaced. Mode 0600. Beside it lie
            a file that is locked while the worker lives, and one that says once it is warm; see `is_warm`.

    Raises:
        OSError: the path cannot be bound, or another worker has it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._num_results = 0
        self._lock = _lock_socket(path)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            _remove_stale_socket(path)
            self._sock.bind(str(path))
            path.chmod(0o600)
            _warm_path(path).unlink(missing_ok=True)
            self._sock.listen(8)
        except BaseException:
            self._sock.close()
            self._unlock()
            raise

    def accept(self, facts: WorkerFacts, join: Join | None = None) -> WorkerSession:
        """Waits for a scheduler with which the handshake succeeds; a failed one is logged and refused.

        Args:
            facts: what it is told.
            join: called during the handshake of a group of several ranks; where it raises, that has failed.
        """
        while True:
            sock, _ = self._sock.accept()
            try:
                channel, scheduler_pid = _worker_handshake(sock, facts, join)
                return WorkerSession(channel, scheduler_pid, self._count_result)
            except PeerGone as error:
                # As a scheduler leaves that finds another rank missing.
                logger.debug("a scheduler left: %s", error)
                sock.close()
            except (HandshakeError, RingError, OSError) as error:
                logger.warning("handshake with a scheduler failed: %s", error)
                with suppress(OSError):
                    send(sock, "refused", pb.Refused(reason=str(error)))
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
        self._unlock()

    def _unlock(self) -> None:
        if self._lock >= 0:
            _lock_path(self.path).unlink(missing_ok=True)  # while it is locked: nobody else's is removed
            os.close(self._lock)
            self._lock = -1


def _lock_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _lock_socket(path: Path) -> int:
    """Locks the file that goes with a socket; its descriptor, whose closing unlocks it.

    A worker that has bound its socket and does not listen yet looks like one that died; the lock, which the
    kernel drops when its holder dies, tells them apart.

    Raises:
        OSError: another worker has it, or the file cannot be made.
    """
    lock = _lock_path(path)
    while True:
        fd = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise OSError(errno.EADDRINUSE, "the address is in use by another worker") from None
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # the worker that had it ended meanwhile, and removed it


def _remove_stale_socket(path: Path) -> None:
    """Removes a socket file that a dead process left; leaves anything else for bind() to complain about."""
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)  # one with many connections waiting is in use too, and would keep us waiting
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError as error:
            logger.debug("%s is in use: %s", path, error)


def _worker_handshake(sock: socket.socket, facts: WorkerFacts, join: Join | None) -> tuple[_Channel, int]:
    """The way to the scheduler, and its pid."""
    sock.settimeout(HANDSHAKE_SECONDS)
    hello = receive(sock, "hello")[0].hello
    check_version(hello.dispatch_version)
    send(sock, "welcome", welcome_of(facts))
    message, fds = receive(sock, "attach", num_fds=2)
    attach = message.attach
    plan_fd, result_fd = fds
    rings: list[Ring] = []
    try:
        rings += [Ring.open(attach.plan_ring), Ring.open(attach.result_ring)]
        plans, results = rings
        needed = result_bytes(_limits(attach.limits))
        if results.shape.slot_bytes < needed:
            raise HandshakeError(
                f"result slots of {results.shape.slot_bytes} bytes; this worker needs {needed}"
            )
        if attach.rendezvous:
            if join is None:
                raise HandshakeError("this worker is alone, and was asked to join a group")
            join(attach.rendezvous)
        send(sock, "attached", pb.Attached())
        channel = _Channel(sock, results, plans, attach.plan_reader, [result_fd, plan_fd])
    except BaseException:
        close_fds(fds)
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

    @property
    def control_fd(self) -> int:
        """Readable once the scheduler is gone."""
        return self._channel.sock.fileno()

    def next_plan(self, *, block: bool) -> StepPlan | None:
        """The next plan; None if none is there and `block` is false.

        Raises:
            SchedulerGone: the scheduler is gone (plans it left behind are not worth computing).
            RecordError: the plan is malformed.
        """
        record = self._channel.receive()
        while record is None and block:
            try:
                self._channel.wait()
            except PeerGone as error:
                raise SchedulerGone(str(error)) from None
            record = self._channel.receive()
        return None if record is None else decode_plan(record)

    def send_result(self, result: StepResult) -> None:
        """Publishes a result, or that there was no shared memory for it, and wakes the scheduler."""
        try:
            self._channel.send(encode_result(result))
        except RingMemoryError as error:
            self._channel.send(encode_result(StepResult(result.step_id, u32([]), error=str(error))))
        if result.step_id not in (WORK_AHEAD_STEP, ADAPTER_STEP):
            self._on_result()

    def close(self) -> None:
        """Leaves the scheduler; it sees the socket close."""
        self._channel.close()


_LIMITS = tuple(each.name for each in fields(EngineLimits) if each.init)


def welcome_of(facts: WorkerFacts) -> pb.Welcome:
    """The facts as a message, where limits are not in a message of their own."""
    values = asdict(facts)
    limits = values.pop("limits")
    for name in _LIMITS:
        values[name] = limits[name]
    return pb.Welcome(dispatch_version=DISPATCH_VERSION, pid=os.getpid(), **values)


def facts_of(welcome: pb.Welcome) -> WorkerFacts:
    """Raises:
    HandshakeError: the limits contradict each other.
    """
    return WorkerFacts(
        model=welcome.model,
        limits=_limits(welcome),
        eos_token_ids=tuple(welcome.eos_token_ids),
        dtype=welcome.dtype,
        device=welcome.device,
        rank=welcome.rank,
        world_size=welcome.world_size,
        num_stages=welcome.num_stages or 1,
        fingerprint=welcome.fingerprint,
        more_ahead=welcome.more_ahead,
        task=welcome.task or "generate",
        labels=tuple(welcome.labels),
        kernels=welcome.kernels,
        weights=welcome.weights,
        quantization=welcome.quantization,
        kv_cache_dtype=welcome.kv_cache_dtype,
        adapters=tuple(
            AdapterFacts(each.adapter_id, each.name, each.path, each.digest, each.retired)
            for each in welcome.adapters
        ),
    )


def limits_message(limits: EngineLimits) -> pb.Limits:
    """The limits as a message."""
    return pb.Limits(**{name: getattr(limits, name) for name in _LIMITS})


def _limits(message: pb.Welcome | pb.Limits) -> EngineLimits:
    """Raises:
    HandshakeError: the limits contradict each other.
    """
    values = {name: getattr(message, name) for name in _LIMITS}
    try:
        return EngineLimits(**values | {"kv_windows": tuple(message.kv_windows)})
    except (ValueError, ZeroDivisionError) as error:
        raise HandshakeError(f"limits that cannot be: {error}") from error
