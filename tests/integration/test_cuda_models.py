"""The Llama and Qwen3 shapes at full width on a CUDA device, through LLM, against transformers on the same
weights; and SmolLM2's real text against the CPU's. Needs a GPU: `make test-gpu`.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import WorkerConfig
from pagewire import LLM, SamplingParams
from pagewire.bench.step_meter import StepMeter
from pagewire.offline.llm import RequestOutput
from scheduler.core import Scheduler
from tests.e2e.prompts import PROMPTS
from tests.integration.random_models import (
    NUM_TOP,
    Reference,
    assert_greedy,
    assert_logprobs_as_good,
    shape_values,
    write_random_model,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

SHAPES = ("llama8b", "qwen06b")
NUM_LAYERS = 4
# Lengths about the edges of blocks (16) and of chunks (512), from one token to many chunks.
LENGTHS = (1, 2, 15, 16, 17, 100, 511, 512, 513, 1500, 3000)
OPTIONS: dict[str, Any] = {
    "device": "cuda",
    "dtype": "bfloat16",
    "max_model_len": 4096,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 512,
    "num_blocks": 2048,
}
WORKER_FIELDS = {field.name for field in dataclasses.fields(WorkerConfig)}
# With and without CUDA graphs, once the worker has them.
MODES: list[dict[str, Any]] = [{}, *([{"enforce_eager": True}] if "enforce_eager" in WORKER_FIELDS else [])]


@dataclasses.dataclass(frozen=True)
class RandomModel:
    """A checkpoint, transformers' answers for it, and how near two logits are a tie in bfloat16."""

    directory: Path
    reference: Reference
    vocab_size: int
    tie: float

    @classmethod
    def make(cls, values: dict[str, Any], directory: Path, device: str) -> RandomModel:
        reference = write_random_model(values, directory, device)
        vocab_size = values["vocab_size"]
        return cls(
            directory, reference, vocab_size, reference.tie(random_prompts(vocab_size, (16, 400, 2000), 9))
        )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RandomModel]:
    """The model of a shape, made when first asked for; both together take 15 GB beside the workers'."""

    @functools.cache
    def make(name: str) -> RandomModel:
        values = shape_values(name, num_layers=NUM_LAYERS)
        return RandomModel.make(values, tmp_path_factory.mktemp(name), "cuda")

    return make


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest, models: Callable[[str], RandomModel]) -> RandomModel:
    return models(request.param)


@pytest.fixture(scope="module", params=MODES, ids=lambda mode: "-".join(mode) or "default")
def llm(request: pytest.FixtureRequest, model: RandomModel) -> Iterator[LLM]:
    with LLM(str(model.directory), **OPTIONS, **request.param) as llm:
        yield llm


def random_prompts(vocab_size: int, lengths: tuple[int, ...], seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [generator.choices(range(vocab_size), k=length) for length in lengths]


def greedy(max_tokens: int, **changes: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **changes)


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def core_of(llm: LLM) -> Scheduler:
    return llm._running().core


def assert_nothing_leaked(llm: LLM) -> None:
    core = core_of(llm)
    assert (core.num_running, core.num_waiting, core.pool.num_used) == (0, 0, 0)
    core.pool.check()


def check_mixed_lengths_and_prefix_hits(llm: LLM, model: RandomModel, lengths: tuple[int, ...]) -> None:
    """Chunked prompts beside decoding ones, then the same prompts with an end that is not cached."""
    prompts = random_prompts(model.vocab_size, lengths, 1)
    outputs = llm.generate(prompts, greedy(24, logprobs=NUM_TOP))
    assert_logprobs_as_good(model.reference, outputs)
    assert_greedy(model.reference, outputs, model.tie)
    ends = random_prompts(model.vocab_size, (7,) * len(prompts), 2)
    again = llm.generate(
        [prompt + end for prompt, end in zip(prompts, ends, strict=True)], greedy(8, logprobs=NUM_TOP)
    )
    assert [output.num_cached_tokens for output in again] == [num_found(length) for length in lengths]
    assert_logprobs_as_good(model.reference, again)
    assert_greedy(model.reference, again, model.tie)
    assert_nothing_leaked(llm)


def num_found(length: int) -> int:
    """How many tokens of a prompt are found when it comes again with another end: its whole blocks, which are
    shared, and what it has of one more, which is copied if that is a quarter of the block or more.
    """
    return length if length % 16 >= 4 else length // 16 * 16


def check_full_batch(llm: LLM, model: RandomModel, count: int) -> None:
    """As many requests at once as there are rows, of different lengths, each ending at its own time."""
    lengths = tuple(random.Random(3).choices(range(1, 65), k=count))
    prompts = random_prompts(model.vocab_size, lengths, 3)
    params = [greedy(8 + index % 16) for index in range(count)]
    outputs = llm.generate(prompts, params)
    assert [len(tokens) for tokens in tokens_of(outputs)] == [param.max_tokens for param in params]
    assert_greedy(model.reference, outputs, model.tie)
    assert_nothing_leaked(llm)


def check_tiny_requests(llm: LLM, model: RandomModel, count: int) -> None:
    """Rows and blocks change hands thousands of times; nothing is lost, and answers stay what they were."""
    generator = random.Random(4)
    [probe] = random_prompts(model.vocab_size, (600,), 5)
    alone = llm.generate([probe], greedy(16))
    lengths = tuple(generator.choices(range(1, 41), k=count))
    params = [greedy(generator.randrange(1, 4)) for _ in range(count)]
    outputs = llm.generate(random_prompts(model.vocab_size, lengths, 6), params)
    assert [len(tokens) for tokens in tokens_of(outputs)] == [param.max_tokens for param in params]
    assert_nothing_leaked(llm)
    core_of(llm).pool.forget()
    again = llm.generate([probe], greedy(16))
    assert again[0].num_cached_tokens == 0
    assert_greedy(model.reference, [*alone, *again, *outputs[-200:]], model.tie)
    assert_nothing_leaked(llm)


def check_preemption(llm: LLM, model: RandomModel, tie: float, count: int) -> None:
    """A pool filled to its last block: requests are preempted and evicted, and say the same as undisturbed.

    Undisturbed: the same requests, a quarter of them at a time, for which the pool suffices. Its tokens and
    the disturbed ones may part only where the exact model's choice is a tie.
    """
    lengths = tuple(random.Random(7).choices(range(50, 151), k=count))
    prompts = random_prompts(model.vocab_size, lengths, 7)
    core = core_of(llm)
    calm: list[RequestOutput] = []
    with StepMeter(core) as meter:
        for start in range(0, count, count // 4):
            calm += llm.generate(prompts[start : start + count // 4], greedy(150))
    assert meter.report(1.0)["num_preemptions"] == 0
    core.pool.forget()  # so that nothing is found that the calm run left behind
    with StepMeter(core) as meter:
        disturbed = llm.generate(prompts, greedy(150))
    steps = meter.report(1.0)
    assert steps["num_preemptions"] > 0
    assert steps["most_blocks_used"] == core.pool.num_blocks
    assert core.pool.num_evictions > 0
    assert_nothing_leaked(llm)
    assert_greedy(model.reference, disturbed, tie)
    assert_greedy(model.reference, calm, tie)
    for prompt, one, other in zip(prompts, tokens_of(calm), tokens_of(disturbed), strict=True):
        parted = next((i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None)
        if parted is not None:
            exact = model.reference.exact(prompt, one[: parted + 1])[-1]
            assert abs(float(exact[one[parted]] - exact[other[parted]])) <= tie


def check_batch_invariance(llm: LLM, model: RandomModel, count: int) -> None:
    """A request has the same tokens alone and among others, bit for bit; greedy ones and seeded ones."""
    lengths = (*random.Random(8).choices(range(1, 200), k=count - 4), 1, 17, 300, 2000)
    prompts = random_prompts(model.vocab_size, lengths, 8)
    params = [
        greedy(32) if index % 2 else SamplingParams(seed=index, top_p=0.9, max_tokens=32, ignore_eos=True)
        for index in range(count)
    ]
    pool = core_of(llm).pool
    together = tokens_of(llm.generate(prompts, params))
    for index in (0, 1, count - 4, count - 3, count - 2, count - 1):
        pool.forget()
        assert tokens_of(llm.generate([prompts[index]], params[index])) == [together[index]]


def test_mixed_lengths_chunks_and_prefix_hits(llm: LLM, model: RandomModel) -> None:
    check_mixed_lengths_and_prefix_hits(llm, model, LENGTHS)


def test_a_full_batch_of_256(llm: LLM, model: RandomModel) -> None:
    check_full_batch(llm, model, 256)


def test_ten_thousand_tiny_requests_leave_the_pool_empty(llm: LLM, model: RandomModel) -> None:
    check_tiny_requests(llm, model, 10_000)


# In float32 next to nothing is a tie: what another order of summing moves is some 1e-5 of logits of about 8.
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_pool_filled_to_the_last_block_preempts_and_changes_nothing(model: RandomModel, dtype: str) -> None:
    tie = model.tie if dtype == "bfloat16" else 5e-3
    with LLM(str(model.directory), **{**OPTIONS, "dtype": dtype, "num_blocks": 320}) as llm:
        check_preemption(llm, model, tie, 64)


if "deterministic" in WORKER_FIELDS:

    def test_deterministic_mode_gives_a_request_the_same_tokens_alone_and_among_255_others(
        model: RandomModel,
    ) -> None:
        with LLM(str(model.directory), **OPTIONS, deterministic=True) as llm:
            check_batch_invariance(llm, model, 256)


# Prompts after which SmolLM2's two likeliest tokens are at least 0.1 apart for 48 tokens in float32.
TEXTS = [PROMPTS[index] for index in (3, 8, 12, 19)]


@pytest.fixture(scope="module")
def cpu_answers(smollm2_dir: Path) -> list[RequestOutput]:
    with LLM(str(smollm2_dir), device="cpu", dtype="float32", max_model_len=512) as llm:
        return llm.generate(TEXTS, greedy(48))


@pytest.mark.parametrize(
    "device",
    [
        "cuda",
        pytest.param(
            "cuda:1",
            marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second CUDA device"),
        ),
    ],
)
def test_real_text_is_the_cpus_in_float32(
    smollm2_dir: Path, cpu_answers: list[RequestOutput], device: str
) -> None:
    with LLM(str(smollm2_dir), device=device, dtype="float32", max_model_len=512, num_blocks=512) as llm:
        outputs = llm.generate(TEXTS, greedy(48))
    assert [output.outputs[0].text for output in outputs] == [each.outputs[0].text for each in cpu_answers]
    assert tokens_of(outputs) == tokens_of(cpu_answers)


def test_real_text_is_the_cpus_in_bfloat16_up_to_ties(
    smollm2_dir: Path, smollm2_float32_dir: Path, cpu_answers: list[RequestOutput]
) -> None:
    """Every token is the float32 choice or a tie with it: where a text parts from the CPU's, it is at a tie,
    and texts without one are the CPU's."""
    reference = Reference.load(smollm2_float32_dir, "cuda")
    tie = reference.tie([output.prompt_token_ids for output in cpu_answers])
    with LLM(str(smollm2_dir), device="cuda", dtype="bfloat16", max_model_len=512, num_blocks=512) as llm:
        outputs = llm.generate(TEXTS, greedy(48))
    assert_greedy(reference, outputs, tie)
    assert (
        sum(
            output.outputs[0].text == answer.outputs[0].text
            for output, answer in zip(outputs, cpu_answers, strict=True)
        )
        >= len(TEXTS) // 2
    )
