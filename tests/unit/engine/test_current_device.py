"""A worker for the second GPU makes it the current one: Triton launches there, wherever tensors are."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from engine.attention.interface import AttentionBackend, HeadLayout
from engine.config import WorkerConfig
from engine.cpu.platform import CpuPlatform
from engine.cuda.platform import CudaPlatform
from engine.loader import stream
from engine.worker.build import build_worker
from tests.unit.engine.tiny_model import write_model

SECOND = torch.device("cuda", 1)


@pytest.fixture
def made_current(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.device, str]]:
    """What is made the current device, and in which thread."""
    calls: list[tuple[torch.device, str]] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: calls.append((device, threading.current_thread().name))
    )
    return calls


def config(model: str = "unread") -> WorkerConfig:
    return WorkerConfig(
        model=model,
        socket=Path("unused"),
        device="cpu",
        dtype="float32",
        num_blocks=8,
        max_num_seqs=2,
        max_num_batched_tokens=16,
        max_model_len=64,
    )


def test_the_platform_makes_its_gpu_the_current_one(made_current: list[tuple[torch.device, str]]) -> None:
    CudaPlatform(config(), SECOND, torch.float32).make_current()
    assert [device for device, _ in made_current] == [SECOND]


def test_a_worker_makes_its_device_current_before_it_allocates_anything(tmp_path: Path) -> None:
    done: list[str] = []

    class Noting(CpuPlatform):
        def make_current(self) -> None:
            done.append("current")

        def attention(self, heads: HeadLayout, max_num_seqs: int) -> AttentionBackend:
            done.append("attention")
            return super().attention(heads, max_num_seqs)

    build_worker(config(str(write_model(tmp_path))), Noting)
    assert done[:2] == ["current", "attention"]


def test_each_thread_that_sends_weights_makes_their_gpu_the_current_one(
    made_current: list[tuple[torch.device, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(stream, "_Buffer", lambda device: None)
    with ExitStack() as stack:
        readers = stream._Uploads(SECOND, stack)._readers
        names = {readers.submit(lambda: threading.current_thread().name).result() for _ in range(20)}
    assert {(SECOND, name) for name in names} <= set(made_current)
