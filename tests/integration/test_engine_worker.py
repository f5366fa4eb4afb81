"""The engine-worker as a process: from its socket to its exit status."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from engine.dispatch.link import WorkerLink
from engine.dispatch.records import NewRequest, StepPlan, StepResult
from engine.dispatch.sampling import u32
from tests.integration.plan_driver import GREEDY
from tests.unit.engine.tiny_model import write_model

PROMPT = [5, 9, 33, 7]
START_SECONDS = 60
OPTIONS = ("--device", "cpu", "--num-blocks", "32", "--max-num-seqs", "4")


def start(model: Path, control: Path) -> subprocess.Popen[str]:
    """Starts a worker and waits until it says that it is ready."""
    notify = control.with_suffix(".notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(notify))
        listener.settimeout(START_SECONDS)
        command = [sys.executable, "-m", "pagewire", "engine-worker", str(model), "--socket", str(control)]
        process = subprocess.Popen(
            [*command, *OPTIONS],
            env={**os.environ, "NOTIFY_SOCKET": str(notify)},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert listener.recv(4096).startswith(b"READY=1")
        except BaseException:
            process.kill()
            raise
    return process


@pytest.fixture
def control(tmp_path: Path) -> Path:
    return tmp_path / "worker.sock"


@contextmanager
def running(directory: Path, control: Path) -> Iterator[subprocess.Popen[str]]:
    process = start(write_model(directory / "model"), control)
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


@pytest.fixture
def worker(tmp_path: Path, control: Path) -> Iterator[subprocess.Popen[str]]:
    with running(tmp_path, control) as process:
        yield process


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A worker that several schedulers use in turn, and its socket."""
    directory = tmp_path_factory.mktemp("shared")
    with running(directory, directory / "worker.sock") as process:
        yield process, directory / "worker.sock"


def request_plan(step_id: int) -> StepPlan:
    request = NewRequest(1, u32(PROMPT), len(PROMPT), u32([step_id]), GREEDY)
    counts = u32([len(PROMPT)])
    return StepPlan(step_id, u32([]), [request], u32([1]), u32([0]), counts, u32([1]), u32([0]), u32([]))


def result_of(link: WorkerLink, plan: StepPlan) -> StepResult:
    link.send_plan(plan)
    result = link.wait_result(30)
    assert result is not None, "no result"
    return result


def test_it_serves_one_scheduler_after_another(shared: tuple[subprocess.Popen[str], Path]) -> None:
    """A scheduler that goes leaves row 1 behind; the next one finds it free and gets the same token."""
    worker, control = shared
    tokens = []
    for step_id in (4, 5):
        link = WorkerLink.connect(control)
        assert link.worker_pid == worker.pid
        assert link.facts.limits.vocab_size == 64
        assert link.facts.eos_token_ids == (2,)
        result = result_of(link, request_plan(step_id))
        assert (result.error, result.step_id) == ("", step_id)
        tokens.append(result.token_ids.tolist())
        link.close()
    assert tokens[0] == tokens[1]


def test_a_bad_plan_is_answered_and_the_worker_lives(shared: tuple[subprocess.Popen[str], Path]) -> None:
    worker, control = shared
    link = WorkerLink.connect(control)
    assert result_of(link, request_plan(1)).error == ""
    assert "row 1 is in use" in result_of(link, request_plan(2)).error
    link.close()
    assert worker.poll() is None


@pytest.mark.parametrize("connected", [False, True])
def test_it_is_idle_at_no_cost_and_exits_0_on_sigterm(
    worker: subprocess.Popen[str], control: Path, connected: bool
) -> None:
    link = WorkerLink.connect(control) if connected else None
    if link is not None:
        result_of(link, request_plan(0))
    process = psutil.Process(worker.pid)
    before = process.cpu_times()
    time.sleep(1.0)
    after = process.cpu_times()
    assert after.user + after.system - before.user - before.system <= 0.01
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(5) == 0
    assert not control.exists()
    if link is not None:
        link.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/model"], "unknown model '/no/such/model'"),
        (["MODEL", "--dtype", "int3"], "dtype is 'int3'"),
        (["MODEL", "--max-model-len", "999"], "max_model_len is 999"),
        (["EMPTY"], "config.json"),
        (["MODEL", "-tp", "2", "--rank", "2"], "rank is 2"),
        (["MODEL", "-pp", "2", "--num-speculative-tokens", "2"], "it must be 1 with draft tokens"),
        (["MODEL", "-tp", "3"], "num_key_value_heads is 2, fewer than ranks"),
        (["MODEL", "--socket", "/no/such/directory/s"], "cannot listen on /no/such/directory/s"),
    ],
    ids=["model", "dtype", "length", "empty directory", "rank", "drafts", "heads", "socket"],
)
def test_a_wrong_setting_ends_it_with_status_2_and_one_clear_line(
    tmp_path: Path, control: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    paths = {"MODEL": str(write_model(tmp_path / "model")), "EMPTY": str(tmp_path / "empty")}
    command = [sys.executable, "-m", "pagewire", "engine-worker", "--socket", str(control), "--device", "cpu"]
    command += [paths.get(argument, argument) for argument in arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS, check=False)
    assert run.returncode == 2
    assert message in run.stderr
    assert "Traceback" not in run.stderr
