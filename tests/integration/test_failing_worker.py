"""A worker that hangs or whose device fails, as a process: what it says and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.dispatch.control import WorkerGone
from engine.dispatch.link import WorkerLink
from engine.dispatch.records import StepPlan, StepResult
from engine.dispatch.sampling import u32
from pagewire.base.exit_status import DEVICE_LOST

SECONDS = 30.0
EMPTY = u32([])

# A real worker process around a runner that fails or hangs in its third step.
WORKER = """
import os, sys, time
from pathlib import Path
from engine.worker.process import tell_stacks
from engine.config import WorkerConfig
from engine.dispatch.facts import WorkerFacts
from engine.dispatch.limits import EngineLimits
from engine.dispatch.records import StepResult, u32
from engine.step.runner import FinishedStep, LoadedWorker
from engine.worker.timeline import Timeline
from engine.worker.loop import run

FACTS = WorkerFacts(model="m", eos_token_ids=(1,), dtype="none", device="none", limits=EngineLimits(
    vocab_size=100, max_model_len=64, block_size=16, num_blocks=8, max_num_seqs=4,
    max_num_batched_tokens=32, hidden_size=8))

class Runner:
    def reset(self):
        pass
    def work_ahead(self):
        return False
    def launch(self, plan):
        if plan.step_id < 2:
            return FinishedStep(StepResult(plan.step_id, u32([])))
        if sys.argv[2] == "hangs":
            self.waits_for_ever()
        return FinishedStep.failed(plan.step_id, "CUDA error: device-side assert triggered", is_last=True)
    def waits_for_ever(self):
        read, _ = os.pipe()
        print("nothing comes any more", file=sys.stderr, flush=True)
        os.read(read, 1)

tell_stacks()
config = WorkerConfig(model="m", socket=Path(sys.argv[1]))
sys.exit(run(config, lambda: LoadedWorker(Runner(), FACTS), Timeline()))
"""


def plan(step_id: int) -> StepPlan:
    return StepPlan(step_id, EMPTY, [], EMPTY, EMPTY, EMPTY, EMPTY, EMPTY, EMPTY)


def next_result(link: WorkerLink) -> StepResult:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if (result := link.wait_result(SECONDS)) is not None:
            return result
    raise AssertionError("no result came")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], tuple[subprocess.Popen[str], WorkerLink]]]:
    processes = []

    def start(behaviour: str) -> tuple[subprocess.Popen[str], WorkerLink]:
        path = tmp_path / "worker.sock"
        command = [sys.executable, "-c", WORKER, str(path), behaviour]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                return process, WorkerLink.connect(path)
            except (FileNotFoundError, ConnectionRefusedError):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_worker_whose_device_fails_reports_the_step_and_ends_with_a_status_of_its_own(
    start: Callable[[str], tuple[subprocess.Popen[str], WorkerLink]],
) -> None:
    process, link = start("fails")
    for step_id in range(3):
        link.send_plan(plan(step_id))
        result = next_result(link)
        assert result.is_last is (step_id == 2)
    assert result.error == "CUDA error: device-side assert triggered"
    with pytest.raises(WorkerGone):
        next_result(link)
    _, log = process.communicate(timeout=SECONDS)
    assert process.returncode == DEVICE_LOST
    assert "the device is lost, ending with status 69: CUDA error: device-side assert triggered" in log
    assert "Traceback" not in log
    link.close()


def test_a_worker_that_hangs_writes_its_stacks_when_asked_and_can_be_killed_through_its_link(
    start: Callable[[str], tuple[subprocess.Popen[str], WorkerLink]],
) -> None:
    process, link = start("hangs")
    for step_id in range(3):
        link.send_plan(plan(step_id))
    for _ in range(2):
        next_result(link)
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    assert any("nothing comes any more" in line for line in lines)
    assert link.wait_result(0.2) is None
    assert link.process.pid == process.pid != os.getpid()
    link.process.signal(signal.SIGUSR1)
    assert any("waits_for_ever" in line for line in lines)
    assert process.poll() is None
    link.process.signal(signal.SIGKILL)
    with pytest.raises(WorkerGone):
        next_result(link)
    assert process.wait(SECONDS) == -signal.SIGKILL
    link.close()
