"""The supervisor with real child processes: small scripts that say they are ready, and die when told to."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pagewire.supervisor import Child, ChildFailed, ChildRefused, ProcessSpec, Supervisor
from pagewire.supervisor import child as child_module

# A child that is ready at once and notes the order of endings in a file when it gets SIGTERM.
POLITE = """
    import os, signal, sys
    from pagewire.base.lifeline import end_with_parent
    from pagewire.base.notify import notify_ready
    def stop(*_):
        with open(sys.argv[1], "a") as journal:
            print(sys.argv[2], file=journal)
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    end_with_parent()
    print("hello from", sys.argv[2])
    notify_ready("all well")
    while True:
        signal.pause()
"""
DEAF = """
    import signal
    from pagewire.base.notify import notify_ready
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    notify_ready()
    while True:
        signal.pause()
"""


class Journal:
    """A report that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[object, ...]] = []

    def starting(self, name: str, pid: int) -> None:
        self.events.append(("starting", name))

    def ready(self, name: str, seconds: float, status: str) -> None:
        self.events.append(("ready", name, status))

    def hung(self, name: str, seconds: float) -> None:
        self.events.append(("hung", name, seconds))

    def log_line(self, name: str, line: str) -> None:
        self.events.append(("log", name, line))

    def died(self, name: str, how: str, restart_in: float) -> None:
        self.events.append(("died", name, how, restart_in))

    def stopping(self, name: str) -> None:
        self.events.append(("stopping", name))

    def stopped(self, name: str, returncode: int) -> None:
        self.events.append(("stopped", name, returncode))

    def killed(self, name: str, seconds: float) -> None:
        self.events.append(("killed", name))

    def of_kind(self, kind: str) -> list[tuple[object, ...]]:
        return [event for event in self.events if event[0] == kind]


def script(source: str, name: str, *arguments: object, stop_timeout: float = 20.0) -> ProcessSpec:
    command = (sys.executable, "-c", textwrap.dedent(source), *map(str, arguments))
    return ProcessSpec(name=name, command=command, stop_timeout=stop_timeout)


def polite(name: str, journal_file: Path) -> ProcessSpec:
    return script(POLITE, name, journal_file, name)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def report() -> Journal:
    return Journal()


async def test_is_ready_when_every_child_has_said_so(tmp_path: Path, report: Journal) -> None:
    stages = [[polite("one", tmp_path / "ends")], [polite("two", tmp_path / "ends")]]
    async with Supervisor(stages, tmp_path, report) as supervisor:
        await supervisor.until_ready()
        assert sorted(report.of_kind("ready")) == [("ready", "one", "all well"), ("ready", "two", "all well")]
        await until(lambda: len(report.of_kind("log")) == 2)
    assert ("log", "one", "hello from one") in report.events


async def test_stops_stage_by_stage(tmp_path: Path, report: Journal) -> None:
    ends = tmp_path / "ends"
    stages = [[polite("frontend", ends)], [polite("scheduler", ends)], [polite("worker", ends)]]
    async with Supervisor(stages, tmp_path, report) as supervisor:
        await supervisor.until_ready()
    assert ends.read_text().split() == ["frontend", "scheduler", "worker"]
    assert report.of_kind("died") == []
    assert report.of_kind("stopped") == [("stopped", name, 0) for name in ("frontend", "scheduler", "worker")]


async def test_restarts_a_killed_child_at_once_and_then_ever_later(tmp_path: Path, report: Journal) -> None:
    async with Supervisor([[polite("one", tmp_path / "ends")]], tmp_path, report) as supervisor:
        [child] = supervisor.children
        for _ in range(3):
            await supervisor.until_ready()
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            await until(lambda: not child.ready.is_set())
        await supervisor.until_ready()
    assert report.of_kind("died") == [
        ("died", "one", "was killed by SIGKILL", delay) for delay in child_module.BACKOFF[:3]
    ]


async def test_a_child_that_was_stable_is_restarted_at_once_again(
    tmp_path: Path, report: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "STABLE_SECONDS", 0.0)
    async with Supervisor([[polite("one", tmp_path / "ends")]], tmp_path, report) as supervisor:
        [child] = supervisor.children
        for _ in range(3):
            await supervisor.until_ready()
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            await until(lambda: not child.ready.is_set())
    assert [event[3] for event in report.of_kind("died")] == [0.0, 0.0, 0.0]


async def test_a_child_is_stable_once_it_has_run_for_twice_as_long_as_it_waited(
    tmp_path: Path, report: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "STABLE_SECONDS", 0.0)
    monkeypatch.setattr(child_module, "BACKOFF", (0.2, 0.4))
    async with Supervisor([[polite("one", tmp_path / "ends")]], tmp_path, report) as supervisor:
        [child] = supervisor.children
        for seconds_of_life in (0.0, 0.0, 0.9, 0.0):
            await supervisor.until_ready()
            await asyncio.sleep(seconds_of_life)
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            await until(lambda: not child.ready.is_set())
    assert [event[3] for event in report.of_kind("died")] == [0.2, 0.4, 0.2, 0.4]


# Is ready the first and the third time that it is run, and hangs the second time.
FORGETFUL = """
    import signal, sys
    from pagewire.base.notify import notify_ready
    with open(sys.argv[1], "a+") as runs:
        print("run", file=runs, flush=True)
        runs.seek(0)
        if len(runs.readlines()) != 2:
            notify_ready()
    while True:
        signal.pause()
"""


async def test_a_child_that_hangs_when_it_is_started_again_is_killed(
    tmp_path: Path, report: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "LEAST_START_SECONDS", 0.5)
    monkeypatch.setattr(child_module, "START_FACTOR", 1.0)
    spec = script(FORGETFUL, "one", tmp_path / "runs", stop_timeout=0.2)
    async with Supervisor([[spec]], tmp_path, report) as supervisor:
        await supervisor.until_ready()
        [child] = supervisor.children
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        await until(lambda: len(report.of_kind("ready")) == 2)
        await asyncio.sleep(0.7)
        assert child.ready.is_set(), "it is not killed once it is ready"
    assert [event[:2] for event in report.of_kind("hung")] == [("hung", "one")]
    assert len(report.of_kind("starting")) == 3


async def test_a_child_that_refuses_its_configuration_fails_the_service_with_its_own_words(
    tmp_path: Path, report: Journal
) -> None:
    bad = script("import sys; sys.exit(print('no such dtype: float7') or 2)", "worker")
    with pytest.raises(ChildRefused, match=r"^worker: no such dtype: float7$") as failure:
        async with Supervisor([[polite("one", tmp_path / "ends"), bad]], tmp_path, report) as supervisor:
            await supervisor.until_ready()
    assert failure.value.returncode == 2
    assert report.of_kind("died") == []
    assert report.of_kind("stopping") == [("stopping", "one")]


async def test_a_child_that_never_becomes_ready_is_given_up(
    tmp_path: Path, report: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "BACKOFF", (0.0,))
    async with Supervisor([[script("raise SystemExit(7)", "one")]], tmp_path, report) as supervisor:
        with pytest.raises(ChildFailed, match="one exited with status 7 4 times in a row"):
            await supervisor.until_ready()


async def test_a_child_that_ignores_sigterm_is_killed_with_its_group(tmp_path: Path, report: Journal) -> None:
    source = f"import subprocess, sys\nprint(subprocess.Popen(['sleep', '100']).pid)\n{textwrap.dedent(DEAF)}"
    deaf = script(source, "deaf", stop_timeout=0.2)
    async with Supervisor([[deaf]], tmp_path, report) as supervisor:
        await supervisor.until_ready()
        await until(lambda: bool(report.of_kind("log")))
    grandchild = int(str(report.of_kind("log")[0][2]))
    assert report.of_kind("killed") == [("killed", "deaf")]
    await until(lambda: gone(grandchild))


async def test_stop_during_back_off_does_not_wait_for_it(
    tmp_path: Path, report: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "BACKOFF", (600.0,))
    async with Supervisor([[script("raise SystemExit(7)", "one")]], tmp_path, report):
        await until(lambda: bool(report.of_kind("died")))
        started = time.monotonic()
    assert time.monotonic() - started < 5
    assert len(report.of_kind("starting")) == 1


async def test_long_and_unfinished_lines_are_passed_on(tmp_path: Path, report: Journal) -> None:
    source = "import sys; sys.stdout.write('x' * 200_000 + '\\n\\xff\\nunfinished'); sys.exit(2)"
    with pytest.raises(ChildFailed):
        async with Supervisor([[script(source, "one")]], tmp_path, report) as supervisor:
            await supervisor.until_ready()
    lines = [str(event[2]) for event in report.of_kind("log")]
    assert "".join(lines[:-2]) == "x" * 200_000
    assert max(map(len, lines)) <= 2 * child_module.MAX_LOG_LINE
    assert lines[-2:] == ["ÿ", "unfinished"]


async def test_waits_without_using_the_cpu(tmp_path: Path, report: Journal) -> None:
    async with Supervisor([[polite("one", tmp_path / "ends")]], tmp_path, report) as supervisor:
        await supervisor.until_ready()
        before = time.thread_time()  # tests side by side have a thread that talks to their controller
        await asyncio.sleep(1.0)
        assert time.thread_time() - before < 0.01


SUPERVISE = """
    import asyncio, sys
    from pathlib import Path
    from pagewire.cli.report import QuietReport
    from pagewire.supervisor import ProcessSpec, Supervisor

    async def main():
        directory = Path(sys.argv[1])
        command = (sys.executable, "-c", sys.argv[2], str(directory / "ends"), "one")
        spec = ProcessSpec(name="one", command=command, stop_timeout=float(sys.argv[3]))
        async with Supervisor([[spec]], directory, QuietReport()) as supervisor:
            async def say_pid():
                print(supervisor.children[0].pid, flush=True)
            await supervisor.serve(say_pid)
        print("killed" if supervisor.killed else "stopped")

    asyncio.run(main())
"""


@pytest.fixture
def supervising(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Starts a supervisor of one child in a process of its own; yields a function that returns both."""
    started: list[subprocess.Popen[str]] = []

    def start(source: str, stop_timeout: float = 20.0) -> tuple[subprocess.Popen[str], int]:
        arguments = (str(tmp_path), textwrap.dedent(source), str(stop_timeout))
        command = [sys.executable, "-c", textwrap.dedent(SUPERVISE), *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        return process, int(process.stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_children_and_ends_with_status_0(supervising, number: signal.Signals) -> None:  # type: ignore[no-untyped-def]
    process, child = supervising(POLITE)
    process.send_signal(number)
    assert process.communicate(timeout=20)[0] == "stopped\n"
    assert process.returncode == 0
    assert gone(child)


def test_a_second_signal_kills(supervising) -> None:  # type: ignore[no-untyped-def]
    process, child = supervising(DEAF, stop_timeout=600.0)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[0] == "killed\n"
    assert gone(child)


async def test_no_child_outlives_a_killed_supervisor(supervising) -> None:  # type: ignore[no-untyped-def]
    process, child = supervising(POLITE)
    process.kill()
    process.wait()
    await until(lambda: gone(child))


async def test_a_child_that_ignores_the_end_of_its_supervisor_is_killed(supervising) -> None:  # type: ignore[no-untyped-def]
    impatient = "from pagewire.base import lifeline\nlifeline.GRACE_SECONDS = 0.2\nlifeline.end_with_parent()"
    process, child = supervising(f"{impatient}\n{textwrap.dedent(DEAF)}")
    process.kill()
    process.wait()
    await until(lambda: gone(child))


async def test_a_terminal_interrupt_reaches_only_the_supervisor(tmp_path: Path, report: Journal) -> None:
    async with Supervisor([[polite("one", tmp_path / "ends")]], tmp_path, report) as supervisor:
        await supervisor.until_ready()
        child: Child = supervisor.children[0]
        assert child.pid is not None
        assert os.getsid(child.pid) == child.pid != os.getsid(0)


# Says how it was asked to end, by the signal's name.
REPLACEABLE = """
    import os, signal, sys
    from pagewire.base.notify import notify_ready
    def stop(number, _):
        with open(sys.argv[1], "a") as journal:
            print(sys.argv[2], signal.Signals(number).name, file=journal)
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGUSR2, stop)
    notify_ready()
    while True:
        signal.pause()
"""


def replaceable(name: str, ends: Path, then: Callable[[], ProcessSpec] | None = None) -> ProcessSpec:
    return replace(script(REPLACEABLE, name, ends, name), successor=then)


async def test_processes_are_replaced_one_after_another_and_told_to_leave(
    tmp_path: Path, report: Journal
) -> None:
    ends = tmp_path / "ends"
    stage = [
        replaceable(name, ends, lambda name=name: replaceable(f"{name}.1", ends)) for name in ("one", "two")
    ]
    async with Supervisor([stage], tmp_path, report) as supervisor:
        await supervisor.until_ready()
        await supervisor.replace_all()
        assert ends.read_text().splitlines() == ["one SIGUSR2", "two SIGUSR2"]
        assert [child.spec.name for child in supervisor.children] == ["one.1", "two.1"]
        events = [event[:2] for event in report.events if event[0] in ("ready", "stopping")]
        assert events[2:] == [
            ("ready", "one.1"),
            ("stopping", "one"),
            ("ready", "two.1"),
            ("stopping", "two"),
        ]
    assert sorted(ends.read_text().splitlines()[2:]) == ["one.1 SIGTERM", "two.1 SIGTERM"]


async def test_a_process_stays_if_its_successor_cannot_be_brought_up(tmp_path: Path, report: Journal) -> None:
    ends = tmp_path / "ends"
    refusing = script("import sys; print('no such file'); sys.exit(2)", "refusing")
    async with Supervisor([[replaceable("one", ends, lambda: refusing)]], tmp_path, report) as supervisor:
        await supervisor.until_ready()
        with pytest.raises(ChildRefused, match="refusing: no such file"):
            await supervisor.replace_all()
        [child] = supervisor.children
        assert (child.spec.name, child.ready.is_set(), ends.exists()) == ("one", True, False)
