"""What a service writes down of itself, and what `pagewire ps` makes of it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from pagewire.base.errors import ConfigError
from pagewire.cli.drain import _chosen, drain
from pagewire.cli.ps import ps
from pagewire.cli.registry import (
    FILE_NAME,
    RecordingReport,
    ServiceRecord,
    _started_ticks,
    running_services,
)
from pagewire.cli.report import QuietReport
from pagewire.cli.tables import duration


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def record(directory: Path) -> ServiceRecord:
    directory.mkdir()
    return ServiceRecord.of_this_process(
        directory=str(directory),
        model="tiny",
        version="1",
        http="http://localhost:8000",
        grpc="localhost:50051",
    )


def test_a_service_and_the_states_of_its_processes_are_listed(
    runtime: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = RecordingReport(record(runtime / "pagewire-a"), QuietReport())
    report.starting("frontend", os.getpid())
    report.starting("scheduler", os.getpid())
    report.ready("frontend", 1.0, "")
    [service] = running_services()
    assert service.state == "starting"
    report.ready("scheduler", 1.0, "")
    report.died("frontend", "was killed", 0.0)
    assert running_services()[0].state == "restarting"
    report.starting("frontend", os.getpid())
    report.ready("frontend", 1.0, "")
    [service] = running_services()
    assert (service.state, service.processes["frontend"].restarts) == ("ready", 1)
    ps(as_json=True)
    [described] = json.loads(capsys.readouterr().out)
    assert (described["model"], described["http"]) == ("tiny", "http://localhost:8000")
    assert described["processes"][0]["resident_bytes"] > 1e6
    ps()
    assert f"frontend {os.getpid()} (restarted 1 times)" in capsys.readouterr().out
    report.stopped("frontend", 0)
    assert list(running_services()[0].processes) == ["scheduler"]


def test_what_a_killed_service_left_is_removed(runtime: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    for name, change in (("a", {"pid": ended.pid}), ("b", {"started_ticks": 1})):
        left = record(runtime / f"pagewire-{name}")
        for key, value in change.items():
            setattr(left, key, value)
        RecordingReport(left, QuietReport())
    assert running_services() == []
    assert list(runtime.iterdir()) == []
    ps()
    assert "'pagewire serve' starts one" in capsys.readouterr().err


def test_of_several_services_the_one_to_drain_must_be_named(runtime: Path) -> None:
    """A bare `drain` that took them all would end what somebody else of the same name works with."""
    sleepers = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    try:
        for number, sleeper in enumerate(sleepers):
            other = record(runtime / f"pagewire-{number}")
            other.pid, other.started_ticks = sleeper.pid, _started_ticks(sleeper.pid)
            RecordingReport(other, QuietReport())
        with pytest.raises(
            ConfigError, match=r"several services run here: .* name one with --pid, or drain --all"
        ):
            drain()
        with pytest.raises(
            ConfigError, match=f"no service .* the process id 1; there is .*{sleepers[0].pid}"
        ):
            drain(pid=1)
        with pytest.raises(ConfigError, match="exclude each other"):
            drain(pid=1, every=True)
        assert [each.pid for each in _chosen(sleepers[1].pid, every=False)] == [sleepers[1].pid]
        assert len(_chosen(None, every=True)) == 2
    finally:
        for sleeper in sleepers:
            sleeper.kill()
            sleeper.wait()


def test_what_is_not_ours_to_judge_stays(runtime: Path) -> None:
    elsewhere = record(runtime / "pagewire-container")
    elsewhere.pid_namespace, elsewhere.pid = "pid:[1]", 2**22 + 1
    RecordingReport(elsewhere, QuietReport())
    (runtime / "pagewire-newer").mkdir()
    (runtime / "pagewire-newer" / FILE_NAME).write_text('{"pid": 1, "something": "else"}')
    assert running_services() == []
    assert len(list(runtime.iterdir())) == 2


def test_a_service_that_cannot_write_its_file_serves(runtime: Path) -> None:
    (runtime / "pagewire-full").mkdir()
    lost = record(runtime / "pagewire-a")
    lost.directory = str(runtime / "gone")
    RecordingReport(lost, QuietReport()).starting("frontend", 1)


def test_durations_are_read_by_people() -> None:
    assert [duration(seconds) for seconds in (5, 125, 3 * 3600 + 61, 3 * 86400)] == [
        "5 s",
        "2 min",
        "3 h 1 min",
        "3 d 0 h",
    ]
