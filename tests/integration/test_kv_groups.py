"""Models with sliding windows, planned by the scheduler's core and computed by the runner for CPUs: log
probabilities are those of a plain computation, though the blocks behind windows are given back at once."""

from __future__ import annotations

from array import array
from collections import deque
from pathlib import Path

import pytest
import torch

from engine.config import WorkerConfig
from engine.cpu.runner import CpuModelRunner
from engine.dispatch.records import TokenLogprobs
from engine.dispatch.sampling import SamplingRecord
from engine.step.runner import PendingStep
from engine.worker.build import build_worker
from scheduler.core import Scheduler
from scheduler.request import Request
from scheduler.settings import CoreSettings
from tests.unit.engine.patchwork_model import naive_logits, write_patchwork

ARCHITECTURES = ["LocalForCausalLM", "PatchworkForCausalLM", "WindowForCausalLM"]
BLOCK_SIZE = 4
SAMPLING = SamplingRecord(temperature=0.0, logprobs=3)


class Engine:
    """A core and a runner, one step ahead as they are in a service.

    What no request holds and nobody can find is overwritten with NaN behind every step, as another request's
    step may do.
    """

    def __init__(self, directory: Path, *, num_blocks: int, budget: int, caching: bool = True) -> None:
        config = WorkerConfig(
            model=str(directory),
            socket=Path("unused"),
            device="cpu",
            dtype="float32",
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
            max_num_seqs=16,
            max_num_batched_tokens=budget,
            max_model_len=128,
        )
        runner = build_worker(config).runner
        assert isinstance(runner, CpuModelRunner)
        self.runner = runner
        self.core = Scheduler(runner.rows.limits, CoreSettings(enable_prefix_caching=caching))
        self.most_used = 0
        self.logprobs: dict[str, list[TokenLogprobs]] = {}

    def add(self, prompt: list[int], num_tokens: int) -> Request:
        name = f"r{len(self.logprobs)}"
        request = Request(name, array("I", prompt), len(prompt), SAMPLING, len(prompt) + num_tokens)
        self.logprobs[name] = []
        self.core.add(request)
        return request

    def run(self) -> None:
        """Until every request has ended."""
        in_flight: deque[PendingStep] = deque()
        while True:
            plan = self.core.schedule() if len(in_flight) < 2 else None
            if plan is not None:
                in_flight.append(self.runner.launch(plan))
                self._ruin_unused()
                continue
            if not in_flight:
                break
            result = in_flight.popleft().result()
            assert not result.error
            output = self.core.update(result)
            for index, (request, _) in enumerate(output.tokens):
                self.logprobs[request.request_id].append(output.logprobs[index])

    def _ruin_unused(self) -> None:
        pool = self.core.pool
        self.most_used = max(self.most_used, pool.num_used)
        unused = [
            block.block_id
            for block in pool._blocks
            if not block.ref_count and block.block_hash is None and block.block_id not in pool.partial
        ]
        self.runner.kv_pool.blocks[:, :, unused] = torch.nan

    def check(self, architecture: str, *requests: Request) -> None:
        """What each was told of is what a plain computation gives."""
        for request in requests:
            tokens, told = request.token_ids.tolist(), self.logprobs[request.request_id]
            assert len(tokens) == request.max_total_tokens
            assert len(told) == request.num_output_tokens
            logits = naive_logits(architecture, tokens)[request.num_prompt_tokens - 1 : -1]
            expected = logits.log_softmax(dim=-1).topk(3)
            for index, each in enumerate(told):
                assert list(each.top_ids) == expected.indices[index].tolist()
                assert list(each.top_logprobs) == pytest.approx(expected.values[index].tolist(), abs=1e-4)


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def directory(tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_patchwork(tmp_path, architecture, monkeypatch)


@pytest.mark.parametrize("budget", [5, 17, 64])
def test_long_requests_in_chunks_of_any_size(directory: Path, architecture: str, budget: int) -> None:
    engine = Engine(directory, num_blocks=200, budget=budget, caching=False)
    requests = [engine.add(prompt(70, 1), 20), engine.add(prompt(3, 2), 40)]
    engine.run()
    engine.check(architecture, *requests)
    assert engine.core.pool.num_used == 0


def test_sixteen_at_once_of_all_lengths(directory: Path, architecture: str) -> None:
    engine = Engine(directory, num_blocks=700, budget=64, caching=False)
    requests = [engine.add(prompt(1 + 5 * i, i), 3 + i) for i in range(16)]
    engine.run()
    engine.check(architecture, *requests)


def test_prefixes_are_found_where_every_group_has_what_it_sees(directory: Path, architecture: str) -> None:
    """The second request has the whole of the first in common, the third a part that is no whole block."""
    engine = Engine(directory, num_blocks=300, budget=23)
    first = engine.add(prompt(61, 1), 12)
    engine.run()
    second = engine.add([*first.token_ids, 5, 6, 7], 12)
    third = engine.add([*first.token_ids[:43], 9, 9], 12)
    engine.run()
    engine.check(architecture, first, second, third)
    assert second.num_cached_tokens >= 68
    assert third.num_cached_tokens >= 40


def test_preempted_requests_go_on_with_the_same_tokens(directory: Path, architecture: str) -> None:
    least = Engine(directory, num_blocks=200, budget=32).core.limits
    engine = Engine(directory, num_blocks=32 * least.num_kv_groups + 10, budget=32)
    requests = [engine.add(prompt(30 + i, i), 60) for i in range(5)]
    engine.run()
    engine.check(architecture, *requests)
    if 0 in least.kv_windows:
        assert engine.core.counters.num_preemptions


def test_a_request_fits_that_has_all_of_its_tokens_in_no_group_with_a_window(
    directory: Path, architecture: str
) -> None:
    """The pool has room for the longest request where layers see everything, and else for their window."""
    windows = Engine(directory, num_blocks=200, budget=64).core.limits.kv_windows
    needed = sum(-(-(window - 1) // BLOCK_SIZE) + 1 if window else 128 // BLOCK_SIZE for window in windows)
    engine = Engine(directory, num_blocks=needed, budget=64)
    assert engine.core.limits.max_model_len == 128
    request = engine.add(prompt(110, 3), 17)
    engine.run()
    engine.check(architecture, request)
    assert engine.most_used <= needed < 128 // BLOCK_SIZE * len(windows)
