"""What a worker does when its device fails it, on a CUDA device: `make test-gpu`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.dispatch.control import WorkerGone
from engine.dispatch.link import WorkerLink
from engine.dispatch.records import NewRequest, StepPlan, StepResult
from engine.dispatch.sampling import SamplingRecord, u32
from pagewire.base.exit_status import DEVICE_LOST

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

OUT_OF_MEMORY, ILLEGAL_INDEX = 1, 3
# The real command, with steps that do what a faulty kernel or a batch too large would do.
FAULTY_WORKER = f"""
import sys
import torch
from engine.cuda.runner import CudaModelRunner
from engine.worker.cli import main

launch = CudaModelRunner._launch

def faulty(self, plan):
    if plan.step_id == {OUT_OF_MEMORY}:
        torch.empty(1 << 50, device="cuda")
    if plan.step_id == {ILLEGAL_INDEX}:
        torch.zeros(1, device="cuda")[torch.full((1,), 5, device="cuda")]
    return launch(self, plan)

CudaModelRunner._launch = faulty
if __name__ == "__main__":  # compiling starts processes that import this
    main(sys.argv[1:])
"""
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 500,
    "max_position_embeddings": 128,
}
PROMPT = [3, 5, 7, 11]


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], WorkerLink]]:
    script, control = tmp_path / "worker.py", tmp_path / "worker.sock"
    script.write_text(FAULTY_WORKER)
    model = tmp_path / "model"
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(model)
    command = [sys.executable, str(script), str(model), "--socket", str(control), "--device", "cuda"]
    process = subprocess.Popen([*command, "--num-blocks", "16"], stderr=subprocess.PIPE, text=True)
    try:
        yield process, connect(process, control)
    finally:
        process.kill()
        process.communicate()


def connect(process: subprocess.Popen[str], control: Path) -> WorkerLink:
    while True:
        try:
            return WorkerLink.connect(control)
        except (FileNotFoundError, ConnectionRefusedError):
            assert process.poll() is None, process.communicate()[1]
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue


def plan(step_id: int) -> StepPlan:
    request = NewRequest(1, u32(PROMPT), len(PROMPT), u32([step_id]), SamplingRecord(temperature=0.0))
    counts = u32([len(PROMPT)])
    freed = u32([1] if step_id else [])
    return StepPlan(step_id, freed, [request], u32([1]), u32([0]), counts, u32([1]), u32([0]), u32([]))


def run(link: WorkerLink, step_id: int) -> StepResult:
    link.send_plan(plan(step_id))
    result = link.wait_result(60)
    assert result is not None
    return result


def test_memory_that_ran_out_fails_one_step_and_an_illegal_index_ends_the_worker(
    worker: tuple[subprocess.Popen[str], WorkerLink],
) -> None:
    process, link = worker
    first = run(link, 0)
    assert first.error == ""
    failed = run(link, OUT_OF_MEMORY)
    assert "OutOfMemoryError" in failed.error
    assert not failed.is_last
    again = run(link, 2)
    assert again.error == ""
    assert again.token_ids.tolist() == first.token_ids.tolist()
    try:
        last = run(link, ILLEGAL_INDEX)
    except WorkerGone:
        last = None
    assert process.wait(60) == DEVICE_LOST
    if last is not None:
        assert last.is_last
        assert "device-side assert" in last.error
