"""The sampler: device time of a step's rows beside the time to read their logits once, and the torch sampler.

Launches are captured in a CUDA graph, and rotate among sets of logits that together are larger than the L2
cache where one step's are 16 MB or more. "floor_us" is the time to read the logits once at the rate of a
large copy; few rows are bound by two launches instead ("empty_launch_us" each). "torch_us" is the wall time
of engine.sampling.sampler.sample on the same logits, which waits for the device. "same" is the share of rows
for which both chose the same token; they round differently, so that one in millions may differ.

Peaked logits keep some tens of tokens at top_p 0.9, as language models' do; flat ones about 36,000, which
takes several more reads of them all. "mixed" is greedy, unfiltered, top_p, and top_k with top_p and a
temperature in turn. "penalties" is the adjustment of eight rows of 1,000 tokens each and their sampling, on
top of a step of S greedy rows; "logprobs" takes 5 of every row.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks import record
from benchmarks.kernels.timing import Call, Timer
from engine.dispatch.sampling import SamplingRecord
from engine.kernels.sampling.adjust import AdjustWorkspace, Penalties, adjust_logits
from engine.kernels.sampling.kernel import SamplingColumns, SamplingWorkspace, sample_rows
from engine.kernels.sampling.logprobs import Logprobs, LogprobsWorkspace, gather_logprobs
from engine.sampling.generator import uniforms
from engine.sampling.parameters import SamplingBatch, SamplingTable
from engine.sampling.sampler import sample

ROWS = (1, 64, 256)
VOCABULARIES = (128_256, 151_936)
SPREAD = {"peaked": 5.0, "flat": 2.0}
NUM_PROMPT_TOKENS, NUM_TOKENS, MAX_MODEL_LEN, NUM_PENALIZED = 800, 1000, 8192, 8
ROTATING_BYTES, MAX_SETS = 256 << 20, 16
TIMER = Timer(warm_up=2, replays=11, host_calls=100)
TORCH_CALLS = 3

TOP_P = SamplingRecord(top_p=0.9)
MIXED = (
    SamplingRecord(temperature=0.0),
    SamplingRecord(),
    TOP_P,
    SamplingRecord(temperature=0.7, top_k=40, top_p=0.95),
)
CASES: dict[str, tuple[str, tuple[SamplingRecord, ...]]] = {
    "greedy": ("peaked", (SamplingRecord(temperature=0.0),)),
    "random": ("peaked", (SamplingRecord(),)),
    "top_p 0.9": ("peaked", (TOP_P,)),
    "top_p 0.9 flat": ("flat", (TOP_P,)),
    "top_k 50": ("peaked", (SamplingRecord(top_k=50),)),
    "mixed": ("peaked", MIXED),
}


class Step:
    """S requests that sample in one step, each with one of the records in turn and a seed of its own.

    Attributes:
        batch, columns: the same parameters for the torch sampler and for the kernels.
        logits: sets of [S, vocab] bf16.
    """

    def __init__(
        self, num_rows: int, vocab_size: int, spread: float, records: tuple[SamplingRecord, ...]
    ) -> None:
        table = SamplingTable(num_rows)
        for row in range(num_rows):
            table.set(row, records[row % len(records)], NUM_PROMPT_TOKENS)
        rows, positions = np.arange(num_rows), np.full(num_rows, NUM_TOKENS)
        self.batch: SamplingBatch = table.select(rows, positions)
        self.batch.columns["seed"] = rows
        draws = uniforms(self.batch.columns["seed"], positions)
        device = {name: torch.from_numpy(self.batch.columns[name].copy()).cuda() for name in _COLUMNS}
        self.columns = SamplingColumns(
            **device,
            draw=torch.from_numpy(draws).cuda(),
            rows=torch.from_numpy(rows.astype(np.int32)).cuda(),
            positions=torch.from_numpy(positions.astype(np.int32)).cuda(),
        )
        bytes_of_a_set = 2 * num_rows * vocab_size
        num_sets = min(-(-ROTATING_BYTES // bytes_of_a_set), MAX_SETS)
        self.logits = [_random_logits(num_rows, vocab_size, spread) for _ in range(num_sets)]
        self.token_ids = torch.randint(
            vocab_size, (num_rows, MAX_MODEL_LEN), dtype=torch.int32, device="cuda"
        )
        self.chosen = torch.zeros(2, num_rows, dtype=torch.int32, device="cuda")
        self.largest = torch.zeros(2, num_rows, device="cuda")
        self.slot = torch.ones(1, dtype=torch.int32, device="cuda")
        self.workspace = SamplingWorkspace.allocate(num_rows, vocab_size, "cuda")

    def sample(self, logits: torch.Tensor) -> None:
        """By the kernels."""
        sample_rows(
            logits,
            columns=self.columns,
            token_ids=self.token_ids,
            out_token_ids=self.chosen,
            out_largest=self.largest,
            slot=self.slot,
            workspace=self.workspace,
        )

    def sample_in_torch(self) -> torch.Tensor:
        """The first set's tokens by the torch sampler, with all else that the batch asks for."""
        return sample(self.logits[0].float(), self.batch, self.token_ids).token_ids


_COLUMNS = ("temperature", "top_k", "top_p", "min_p")


def _random_logits(num_rows: int, vocab_size: int, spread: float) -> torch.Tensor:
    return (torch.randn(num_rows, vocab_size, device="cuda") * spread).bfloat16()


def measure_sampling(step: Step) -> dict[str, float]:
    """Times both samplers, after comparing what they choose."""
    step.sample(step.logits[0])
    same = (step.chosen[1] == step.sample_in_torch()).float().mean().item()
    calls = [lambda logits=logits: step.sample(logits) for logits in step.logits]
    return {
        "us": round(TIMER.device_us(calls), 2),
        "torch_us": round(wall_us(step.sample_in_torch), 1),
        "host_us": round(TIMER.host_us(calls[0]), 1),
        "same": round(same, 4),
    }


def measure_logprobs(num_rows: int, vocab_size: int) -> dict[str, float]:
    """Five of every row's log probabilities; torch's part is log_softmax and topk."""
    step = Step(num_rows, vocab_size, SPREAD["peaked"], (SamplingRecord(temperature=0.0),))
    index = torch.arange(num_rows, dtype=torch.int32, device="cuda")
    workspace = LogprobsWorkspace.allocate(num_rows, vocab_size, "cuda")
    out = Logprobs(
        torch.empty(num_rows, device="cuda"),
        torch.empty(num_rows, 5, dtype=torch.int32, device="cuda"),
        torch.empty(num_rows, 5, device="cuda"),
    )

    def gather(logits: torch.Tensor) -> None:
        gather_logprobs(
            logits,
            index=index,
            chosen=step.chosen,
            slot=step.slot,
            num_top=5,
            workspace=workspace,
            out=out,
        )

    def in_torch() -> torch.return_types.topk:
        return step.logits[0].float().log_softmax(dim=-1).topk(5, dim=-1)

    gather(step.logits[0])
    error = (out.top_logprobs - in_torch().values).abs().max().item()
    assert error < 1e-4, f"log probabilities are off by {error}"
    calls = [lambda logits=logits: gather(logits) for logits in step.logits]
    return {
        "us": round(TIMER.device_us(calls), 2),
        "torch_us": round(wall_us(in_torch), 1),
        "host_us": round(TIMER.host_us(calls[0]), 1),
    }


def measure_penalties(num_rows: int, vocab_size: int) -> dict[str, float]:
    """What the few rows with penalties add to a step, and the torch sampler's whole step with them."""
    penalized = SamplingRecord(temperature=0.0, repetition_penalty=1.1, frequency_penalty=0.3)
    num_penalized = min(NUM_PENALIZED, num_rows)
    plain = (SamplingRecord(temperature=0.0),) * (num_rows - num_penalized)
    step = Step(num_rows, vocab_size, SPREAD["peaked"], (penalized,) * num_penalized + plain)
    index = torch.arange(num_penalized, dtype=torch.int32, device="cuda")
    columns = step.batch.columns[:num_penalized]
    repetition, presence, frequency = (
        torch.from_numpy(columns[f"{name}_penalty"].copy()).cuda()
        for name in ("repetition", "presence", "frequency")
    )
    prompt = torch.full((num_penalized,), NUM_PROMPT_TOKENS, dtype=torch.int32, device="cuda")
    workspace = AdjustWorkspace.allocate(num_penalized, vocab_size, "cuda")

    def resample(logits: torch.Tensor) -> None:
        adjusted = adjust_logits(
            logits,
            index=index,
            rows=step.columns.rows,
            positions=step.columns.positions,
            token_ids=step.token_ids,
            penalties=Penalties(repetition, presence, frequency, prompt),
            lists=None,
            workspace=workspace,
        )
        sample_rows(
            adjusted,
            columns=step.columns,
            token_ids=step.token_ids,
            out_token_ids=step.chosen,
            out_largest=None,
            slot=step.slot,
            workspace=step.workspace,
            index=index,
        )

    step.sample(step.logits[0])
    resample(step.logits[0])
    same = (step.chosen[1] == step.sample_in_torch()).float().mean().item()
    calls = [lambda logits=logits: resample(logits) for logits in step.logits]
    return {
        "us": round(TIMER.device_us(calls), 2),
        "torch_us": round(wall_us(step.sample_in_torch), 1),
        "host_us": round(TIMER.host_us(calls[0]), 1),
        "same": round(same, 4),
    }


def measurements(num_rows: int, vocab_size: int) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """All cases of one shape, by name."""

    def of(case: str) -> Callable[[], dict[str, float]]:
        kind, records = CASES[case]
        return lambda: measure_sampling(Step(num_rows, vocab_size, SPREAD[kind], records))

    yield from ((case, of(case)) for case in CASES)
    yield "logprobs 5", lambda: measure_logprobs(num_rows, vocab_size)
    yield "penalties", lambda: measure_penalties(num_rows, vocab_size)


def wall_us(call: Call) -> float:
    """Median time of a call and of the device's work for it."""
    seconds = []
    for _ in range(TORCH_CALLS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) * 1e6


def main() -> None:
    """Measures and reports."""
    arguments = record.parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    torch.manual_seed(0)
    copy_bandwidth = TIMER.copy_bandwidth()
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "copy_gb_per_s": round(copy_bandwidth / 1e9),
        "empty_launch_us": round(TIMER.empty_launch_us(MAX_SETS), 2),
    }
    for vocab_size in VOCABULARIES:
        for num_rows in ROWS:
            floor_us = 2 * num_rows * vocab_size / copy_bandwidth * 1e6
            for name, measure in measurements(num_rows, vocab_size):
                figures = measure()
                share = {"floor_us": round(floor_us, 2), "floor_share": round(floor_us / figures["us"], 3)}
                results[f"V={vocab_size} S={num_rows} {name}"] = figures | share
                torch.cuda.empty_cache()
    record.write(arguments.json, results)


if __name__ == "__main__":
    main()
