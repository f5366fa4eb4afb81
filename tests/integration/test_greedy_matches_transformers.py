"""The engine's greedy tokens are those of transformers' own implementation, in fp32, on a real model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.config import WorkerConfig
from engine.cpu.runner import CpuModelRunner
from engine.dispatch.records import NewRequest, StepPlan
from engine.dispatch.sampling import u32
from engine.worker.build import build_worker
from tests.integration.plan_driver import GREEDY, PlanDriver

OUTPUT_TOKENS = 8
# Where the two best logits are closer than this, either token is right.
TIE = 1e-4
# Token ids rather than text: the subject is the engine. Lengths from one token to many blocks.
PROMPT_LENGTHS = (1, 2, 15, 16, 17, 50, 130)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(20)
    return [torch.randint(3, 49152, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


@pytest.fixture(scope="module")
def references(smollm2_float32_dir: Path, prompts: list[list[int]]) -> list[torch.Tensor]:
    """transformers' sequences of prompt and greedy tokens, with the logits that follow each token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        smollm2_float32_dir, dtype=torch.float32, attn_implementation="eager"
    )
    sequences = []
    with torch.inference_mode():
        for prompt in prompts:
            tokens = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=OUTPUT_TOKENS,
                min_new_tokens=OUTPUT_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            sequences.append((tokens[0], model(tokens).logits[0]))
    return sequences


@pytest.fixture(scope="module")
def runner(smollm2_dir: Path) -> CpuModelRunner:
    config = WorkerConfig(
        model=str(smollm2_dir), socket=Path("unused"), device="cpu", dtype="float32", num_blocks=256
    )
    return build_worker(config).runner


def assert_same_tokens(
    output: list[int], prompt: list[int], reference: tuple[torch.Tensor, torch.Tensor]
) -> None:
    tokens, logits = reference
    expected = tokens[len(prompt) :].tolist()
    for i, (ours, theirs) in enumerate(zip(output, expected, strict=True)):
        if ours != theirs:
            best = logits[len(prompt) + i - 1].topk(2)
            tied = float(best.values[0] - best.values[1]) < TIE and ours in best.indices.tolist()
            assert tied, f"token {i} is {ours}, transformers' is {theirs}"
            return  # What follows a tie may differ.


@pytest.mark.parametrize(
    ("budget", "steps_ahead"), [pytest.param(7, 0, marks=pytest.mark.slow), (33, 1), (256, 0)]
)
def test_requests_together_under_any_token_budget(runner, prompts, references, budget, steps_ahead) -> None:
    runner.reset()
    requests = PlanDriver(runner, budget=budget, steps_ahead=steps_ahead).generate(prompts, OUTPUT_TOKENS)
    for request, prompt, reference in zip(requests, prompts, references, strict=True):
        assert_same_tokens(request.output, prompt, reference)


def test_one_request_at_a_time(runner, prompts, references) -> None:
    for prompt, reference in zip(prompts, references, strict=True):
        runner.reset()
        [request] = PlanDriver(runner).generate([prompt], OUTPUT_TOKENS)
        assert_same_tokens(request.output, prompt, reference)


def test_a_request_that_enters_with_its_output_goes_on_as_before(runner, prompts, references) -> None:
    """What a preempted request does: its row and blocks are new, its tokens are not."""
    half = OUTPUT_TOKENS // 2
    for prompt, (tokens, logits) in zip(prompts, references, strict=True):
        runner.reset()
        resumed = tokens[: len(prompt) + half].tolist()
        [request] = PlanDriver(runner, budget=33).generate([resumed], OUTPUT_TOKENS - half)
        assert_same_tokens(request.output, resumed, (tokens, logits))


def test_blocks_shared_with_another_request_are_read_and_not_recomputed(runner, prompts, references) -> None:
    """What a prefix hit does: the second request starts behind the blocks it shares with the first."""
    prompt, (tokens, _) = prompts[-1], references[-1]
    shared = len(prompt) // 16 * 16
    blocks = list(range(10, 10 + len(prompt) // 16 + 1))
    own = [*blocks[:-1], 99]
    runner.reset()
    plans = [(0, blocks, 0, len(prompt)), (1, own, shared, len(prompt) - shared)]
    for step_id, (row, block_ids, start, count) in enumerate(plans):
        request = NewRequest(row, u32(prompt), len(prompt), u32(block_ids), GREEDY)
        plan = StepPlan(
            step_id, u32([]), [request], u32([row]), u32([start]), u32([count]), u32([1]), u32([0]), u32([])
        )
        result = runner.launch(plan).result()
        assert result.error == ""
        assert result.token_ids.tolist() == [tokens[len(prompt)].item()]
