"""The handshake, wake-ups and liveness between a scheduler and a worker, over real sockets and rings."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.dispatch import control
from engine.dispatch.control import (
    HandshakeError,
    SchedulerGone,
    WorkerEndpoint,
    WorkerGone,
    WorkerSession,
    rank_socket,
)
from engine.dispatch.facts import WorkerFacts
from engine.dispatch.limits import EngineLimits
from engine.dispatch.link import OtherWorldSize, WorkerLink
from engine.dispatch.records import DISPATCH_VERSION, StepPlan, StepResult
from engine.dispatch.ring import RingError
from engine.dispatch.sampling import u32
from pagewire.worker.v1 import worker_pb2 as pb
from tests.segments import segments_of

FACTS = WorkerFacts(
    model="a-model",
    limits=EngineLimits(
        vocab_size=100,
        max_model_len=64,
        block_size=16,
        num_blocks=8,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        hidden_size=64,
        kv_windows=(0, 20),
    ),
    eos_token_ids=(1, 2),
    dtype="float32",
    device="cpu",
)
EMPTY = u32([])


def empty_plan(step_id: int) -> StepPlan:
    return StepPlan(step_id, EMPTY, [], EMPTY, EMPTY, EMPTY, EMPTY, EMPTY, EMPTY)


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[WorkerEndpoint]:
    endpoint = WorkerEndpoint(tmp_path / "worker.sock")
    yield endpoint
    endpoint.close()


def attach(endpoint: WorkerEndpoint, facts: WorkerFacts = FACTS) -> tuple[WorkerLink, WorkerSession]:
    sessions: list[WorkerSession] = []
    thread = threading.Thread(target=lambda: sessions.append(endpoint.accept(facts)))
    thread.start()
    link = WorkerLink.connect(endpoint.path)
    thread.join()
    return link, sessions[0]


def test_the_handshake_tells_what_a_model_classifies(endpoint: WorkerEndpoint) -> None:
    limits = replace(FACTS.limits, hidden_size=64, num_labels=2)
    facts = replace(FACTS, limits=limits, task="classify", labels=("bad", "good"), quantization="awq")
    link, session = attach(endpoint, facts)
    assert link.facts == facts
    assert facts.limits.pooled_size == 2
    link.close()
    session.close()


def test_the_handshake_carries_the_facts_and_leaves_nothing_in_dev_shm(endpoint: WorkerEndpoint) -> None:
    link, session = attach(endpoint)
    assert link.facts == FACTS
    assert link.worker_pid == session.scheduler_pid == os.getpid()
    assert segments_of([os.getpid()]) == []
    session.close()
    link.close()


def test_plans_and_results_go_back_and_forth(endpoint: WorkerEndpoint) -> None:
    link, session = attach(endpoint)
    for step_id in range(20):
        link.send_plan(empty_plan(step_id))
        plan = session.next_plan(block=True)
        assert plan is not None
        session.send_result(StepResult(plan.step_id, u32([plan.step_id + 5])))
        result = link.wait_result(timeout=5)
        assert result is not None
        assert (result.step_id, result.token_ids.tolist()) == (step_id, [step_id + 5])
    assert session.next_plan(block=False) is None
    assert link.wait_result(timeout=0.01) is None
    session.close()
    link.close()


def test_a_worker_that_has_computed_its_first_steps_can_be_told_from_one_that_has_not(
    endpoint: WorkerEndpoint,
) -> None:
    for num_results in (control.NUM_FIRST_STEPS - 1, 1):  # over two schedulers
        assert not control.is_warm(endpoint.path)
        link, session = attach(endpoint)
        for step_id in range(num_results):
            link.send_plan(empty_plan(step_id))
            assert session.next_plan(block=True) is not None
            session.send_result(StepResult(step_id, u32([])))
            assert link.wait_result(timeout=5) is not None
        session.close()
        link.close()
    assert control.is_warm(endpoint.path)
    endpoint.close()
    assert not control.is_warm(endpoint.path)
    assert list(endpoint.path.parent.iterdir()) == []


def test_a_worker_that_was_killed_leaves_the_next_one_cold(tmp_path: Path) -> None:
    path = tmp_path / "worker.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as killed:
        killed.bind(str(path))
    for left in (".warm", ".lock"):
        path.with_name(path.name + left).touch()
    assert control.is_warm(path)
    successor = WorkerEndpoint(path)
    assert not control.is_warm(path)
    successor.close()
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_has_bound_its_socket_and_does_not_listen_yet_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, second = tmp_path / "worker.sock", list[OSError]()

    class Slow(socket.socket):
        def listen(self, backlog: int = 8) -> None:
            monkeypatch.undo()
            try:
                WorkerEndpoint(path)
            except OSError as error:
                second.append(error)
            super().listen(backlog)

    monkeypatch.setattr(socket, "socket", Slow)
    first = WorkerEndpoint(path)
    assert [error.errno for error in second] == [errno.EADDRINUSE]
    link, session = attach(first)
    link.close()
    session.close()
    first.close()


def test_a_socket_with_many_connections_waiting_is_found_in_use_at_once(tmp_path: Path) -> None:
    path = tmp_path / "worker.sock"
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listener.bind(str(path))
        listener.listen(0)
        with suppress(BlockingIOError):
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                waiting.setblocking(False)
                waiting.connect(str(path))
        refusals: list[OSError] = []

        def start() -> None:
            try:
                WorkerEndpoint(path)
            except OSError as error:
                refusals.append(error)

        thread = threading.Thread(target=start, daemon=True)
        thread.start()
        thread.join(5)
        assert [error.errno for error in refusals] == [errno.EADDRINUSE]
        assert path.exists()


def test_no_record_is_read_before_its_signal_was_taken(
    endpoint: WorkerEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cursor that has moved does not say that the record can be seen, on a processor that reorders."""
    link, session = attach(endpoint)
    signals: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "eventfd_write", lambda fd, value: signals.append(fd))
        link.send_plan(empty_plan(0))
    assert session.next_plan(block=False) is None
    for fd in signals:
        os.eventfd_write(fd, 1)
    with monkeypatch.context() as patch:
        taken, take = [], os.eventfd_read
        patch.setattr(os, "eventfd_read", lambda fd: taken.append(fd) or take(fd))
        link.send_plan(empty_plan(1))
        for step_id in range(2):
            plan = session.next_plan(block=False)
            assert plan is not None
            assert plan.step_id == step_id
        assert len(taken) == 1, "one system call for all that has come"
        assert session.next_plan(block=False) is None
        assert len(taken) == 1, "and none for what has not"
    session.send_result(StepResult(0, EMPTY))
    assert link.poll_result() is not None
    session.close()
    link.close()


def test_a_writer_far_ahead_is_stopped_by_the_ring(endpoint: WorkerEndpoint) -> None:
    link, session = attach(endpoint)
    for step_id in range(control.RING_SLOTS):
        link.send_plan(empty_plan(step_id))
    with pytest.raises(RingError, match="full"):
        link.send_plan(empty_plan(control.RING_SLOTS))
    session.close()
    link.close()


def test_each_side_learns_at_once_that_the_other_is_gone(endpoint: WorkerEndpoint) -> None:
    link, session = attach(endpoint)
    session.close()
    with pytest.raises(WorkerGone):
        link.wait_result()
    link.close()
    link, session = attach(endpoint)
    link.close()
    with pytest.raises(SchedulerGone):
        session.next_plan(block=True)
    session.close()


def test_a_worker_that_is_killed_while_the_scheduler_waits_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "worker.sock"
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time, pathlib\n"
            "from tests.unit.dispatch.test_control import FACTS, WorkerEndpoint\n"
            "endpoint = WorkerEndpoint(pathlib.Path(sys.argv[1]))\n"
            "print('listening', flush=True)\n"
            "session = endpoint.accept(FACTS)\n"
            "time.sleep(60)\n",
            str(path),
        ],
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.readline()
    link = WorkerLink.connect(path)
    threading.Timer(0.1, child.kill).start()
    with pytest.raises(WorkerGone):
        link.wait_result(timeout=30)
    child.wait()
    child.stdout.close()
    link.close()


def test_one_worker_serves_one_scheduler_after_another(endpoint: WorkerEndpoint) -> None:
    for _ in range(3):
        link, session = attach(endpoint)
        link.send_plan(empty_plan(0))
        assert session.next_plan(block=True) is not None
        link.close()
        session.close()
    descriptors = len(os.listdir("/proc/self/fd"))
    link, session = attach(endpoint)
    link.close()
    session.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_result_without_shared_memory_for_it_becomes_an_error(
    endpoint: WorkerEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, session = attach(
        endpoint, replace(FACTS, limits=replace(FACTS.limits, max_num_seqs=64, hidden_size=4096))
    )

    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refuse)
        pooled = {index: np.zeros(4096, np.float32) for index in range(64)}
        session.send_result(StepResult(7, EMPTY, pooled=pooled))
    result = link.wait_result(1.0)
    assert result is not None
    assert (result.step_id, result.pooled) == (7, {})
    assert "no memory in /dev/shm" in result.error
    session.send_result(StepResult(8, EMPTY, pooled=pooled))
    result = link.wait_result(1.0)
    assert result is not None
    assert len(result.pooled) == 64
    session.close()
    link.close()


@contextmanager
def two_ranks(tmp_path: Path, **changes: Any) -> Iterator[tuple[Path, list[WorkerSession], list[str]]]:
    """Two workers that wait for a scheduler; the second's facts are changed. Yields where they listen, and
    their sessions and the places where they were told to meet, once there are any."""
    path, limits = tmp_path / "worker.sock", replace(FACTS.limits, max_num_seqs=3, num_blocks=16)
    facts = [
        replace(FACTS, rank=0, world_size=2, fingerprint="same"),
        replace(replace(FACTS, rank=1, world_size=2, fingerprint="same", limits=limits), **changes),
    ]
    endpoints = [WorkerEndpoint(rank_socket(path, rank)) for rank in range(2)]
    sessions: dict[int, WorkerSession] = {}
    rendezvous: list[str] = []

    def serve(rank: int) -> None:
        sessions[rank] = endpoints[rank].accept(facts[rank], rendezvous.append)

    threads = [threading.Thread(target=serve, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()

    class Sessions(list[WorkerSession]):
        def __getitem__(self, rank: Any) -> Any:
            threads[rank].join()
            return sessions[rank]

    yield path, Sessions(), rendezvous
    for session in sessions.values():
        session.close()
    for endpoint in endpoints:
        endpoint.close()


def test_all_ranks_get_every_plan_and_each_reports_by_itself(tmp_path: Path) -> None:
    with two_ranks(tmp_path) as (path, sessions, rendezvous):
        link = WorkerLink.connect(path, world_size=2)
        assert [rank.facts.rank for rank in link.ranks] == [0, 1]
        # The least that each can take of rows and of blocks.
        assert (link.facts.limits.max_num_seqs, link.facts.limits.num_blocks) == (3, 8)
        for step_id in range(10):
            link.send_plan(empty_plan(step_id))
            for rank in range(2):
                plan = sessions[rank].next_plan(block=True)
                assert plan is not None
                assert plan.step_id == step_id
                assert link.poll_result(rank) is None
                sessions[rank].send_result(StepResult(step_id, u32([rank])))
                link.wait(5)
                result = link.poll_result(rank)
                assert result is not None
                assert result.token_ids.tolist() == [rank]
        assert len(rendezvous) == 2
        assert len(set(rendezvous)) == 1
        assert segments_of([os.getpid()]) == []
        Path(rendezvous[0]).touch()
        link.close()
        assert not Path(rendezvous[0]).exists()
        with pytest.raises(SchedulerGone):
            sessions[1].next_plan(block=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "the worker at the socket of rank 1 of 2 says that it is rank 0 of 2"),
        ({"world_size": 3}, "says that it is rank 1 of 3"),
        ({"fingerprint": "other"}, "differ in fingerprint: .*same.*other"),
        ({"dtype": "bfloat16"}, "differ in dtype"),
        ({"limits": replace(FACTS.limits, block_size=32)}, r"differ in block_size: \[16, 32\]"),
        ({"limits": replace(FACTS.limits, kv_windows=(0,))}, r"differ in kv_windows: \[\(0,\), \(0, 20\)\]"),
    ],
)
def test_ranks_that_do_not_belong_together_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with two_ranks(tmp_path, **changes) as (path, _sessions, _):
        open_before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(HandshakeError, match=message):
            WorkerLink.connect(path, world_size=2)
        until(lambda: len(os.listdir("/proc/self/fd")) == open_before)
        until(lambda: len(re.findall(f"handshake with a scheduler failed: .*{message}", caplog.text)) == 2)
    assert descriptors <= open_before


def test_a_scheduler_learns_how_many_ranks_there_are(tmp_path: Path) -> None:
    with two_ranks(tmp_path) as (path, sessions, _):
        with pytest.raises(OtherWorldSize) as caught:
            WorkerLink.connect(path)
        assert caught.value.world_size == 2
        link = WorkerLink.connect(path, world_size=2)
        assert sessions[1].next_plan(block=False) is None
        link.close()


@contextmanager
def accepting(endpoint: WorkerEndpoint, facts: WorkerFacts, join: Callable[[str], None]) -> Iterator[None]:
    """A thread takes one scheduler, if the handshake succeeds, and ends with the block at the latest."""

    def accept() -> None:
        with suppress(OSError):  # how it hears that nobody listens any more
            endpoint.accept(facts, join).close()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield
    finally:
        endpoint._sock.shutdown(socket.SHUT_RDWR)  # closing it would not wake the thread
        thread.join()


def test_a_rank_that_cannot_meet_the_others_says_why(endpoint: WorkerEndpoint) -> None:
    def fail(rendezvous: str) -> None:
        raise OSError("rank 0 did not meet the others")

    other = WorkerEndpoint(rank_socket(endpoint.path, 1))
    facts = replace(FACTS, world_size=2)
    with (
        accepting(endpoint, facts, fail),
        accepting(other, replace(facts, rank=1), lambda _: None),
        pytest.raises(HandshakeError, match="rank 0 did not meet the others"),
    ):
        WorkerLink.connect(endpoint.path, world_size=2)
    other.close()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def misbehave(endpoint: WorkerEndpoint, talk: Callable[[socket.socket], None]) -> pb.Control:
    """A stranger talks to the worker's socket; what the worker answers in the end."""
    answers: list[pb.Control] = []

    def stranger() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(str(endpoint.path))
            talk(sock)
            while packet := sock.recv(65536):
                answers.append(pb.Control.FromString(packet))

    thread = threading.Thread(target=stranger)
    thread.start()
    link, session = None, None

    def friend() -> None:
        nonlocal link
        thread.join()
        link = WorkerLink.connect(endpoint.path)

    friendly = threading.Thread(target=friend)
    friendly.start()
    session = endpoint.accept(FACTS)
    friendly.join()
    assert link is not None, "the worker goes on to serve the next scheduler"
    link.close()
    session.close()
    return answers[-1]


def test_a_scheduler_of_another_version_is_refused_with_both_versions_named(endpoint: WorkerEndpoint) -> None:
    hello = pb.Control(hello=pb.Hello(dispatch_version=999))
    answer = misbehave(endpoint, lambda sock: sock.send(hello.SerializeToString()))
    assert "999" in answer.refused.reason
    assert f"this process {DISPATCH_VERSION}" in answer.refused.reason


def test_garbage_and_silence_on_the_control_socket_are_refused(
    endpoint: WorkerEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "malformed" in misbehave(endpoint, lambda sock: sock.send(b"\xff" * 100)).refused.reason
    monkeypatch.setattr(control, "HANDSHAKE_SECONDS", 0.1)
    assert "no hello within" in misbehave(endpoint, lambda sock: None).refused.reason


def test_an_attach_that_names_another_file_is_refused(endpoint: WorkerEndpoint) -> None:
    def talk(sock: socket.socket) -> None:
        sock.send(pb.Control(hello=pb.Hello(dispatch_version=DISPATCH_VERSION)).SerializeToString())
        sock.recv(65536)
        attach = pb.Attach(plan_ring="../../etc/passwd", result_ring="x")
        read_fd, write_fd = os.pipe()
        socket.send_fds(sock, [pb.Control(attach=attach).SerializeToString()], [read_fd, write_fd])
        os.close(read_fd)
        os.close(write_fd)

    assert "not the name of a ring" in misbehave(endpoint, talk).refused.reason


def test_a_socket_left_by_a_dead_worker_is_replaced_but_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "worker.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))
    live = WorkerEndpoint(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(OSError, match="in use"):
        WorkerEndpoint(path)
    live.close()
    assert not path.exists()


def test_connecting_where_nobody_listens_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        WorkerLink.connect(tmp_path / "nobody.sock")


def test_the_schedulers_side_refuses_a_worker_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "worker.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(str(path))
        server.listen()

        def answer() -> None:
            sock, _ = server.accept()
            with sock:
                sock.recv(65536)
                sock.send(pb.Control(welcome=pb.Welcome(dispatch_version=99)).SerializeToString())

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(HandshakeError, match="version 99"):
            WorkerLink.connect(path)
        thread.join()
