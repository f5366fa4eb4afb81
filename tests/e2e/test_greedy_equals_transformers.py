"""Greedy tokens are transformers' own, however requests are batched, chunked, cached or preempted.

The reference is transformers' Llama in float32 on the same dequantized weights. It reads prompt and
completion in one forward pass; where its likeliest token after every prefix is the one we generated, its own
greedy generation would have produced exactly our tokens. Where its two likeliest logits are within 1e-4 of
each other either token is accepted, and the test says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conformance.reference import reference_model
from tests.e2e.client import complete_all, tokens
from tests.e2e.prompts import greedy, prompt_ids
from tools.service import Service

TIE = 1e-4
MAX_TOKENS = 16
FEW_TOKENS = 8
FIRST_TOKENS = 4


class Reference:
    """transformers' greedy choice, by teacher forcing."""

    def __init__(self, directory: Path) -> None:
        self._model = reference_model(directory)
        self._checked: dict[tuple[int, ...], list[int]] = {}

    def check(self, prompt: list[int], completion: list[int]) -> None:
        """Asserts that greedy generation after the prompt gives this completion, up to ties."""
        sequence = prompt + completion
        if self._checked.get(tuple(prompt), [])[: len(completion)] == completion:
            return  # as when more of it was checked
        with torch.inference_mode():
            logits = self._model(torch.tensor([sequence])).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2)
        for position, token in enumerate(completion):
            choice, gap = best.indices[position].tolist(), float(-best.values[position].diff())
            if token != choice[0]:
                assert token == choice[1], f"token {position} is {token}, transformers has {choice[0]}"
                assert gap <= TIE, f"token {position} is {token}, transformers prefers {choice[0]} by {gap}"
                warnings.warn(f"accepted a tie within {gap:.1e} at token {position}", stacklevel=2)
        self._checked[tuple(prompt)] = completion


@pytest.fixture(scope="module")
def reference(smollm2_float32_dir: Path) -> Iterator[Reference]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield Reference(smollm2_float32_dir)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def prompts(smollm2_dir: Path) -> list[list[int]]:
    return prompt_ids(smollm2_dir)


async def _check(
    service: Service,
    reference: Reference,
    prompts: list[list[int]],
    concurrency: int,
    max_tokens: int = MAX_TOKENS,
) -> int:
    """Completes and checks all prompts; the number of prompt tokens that came from the cache."""
    completions, cached = await _complete(service, prompts, concurrency, max_tokens)
    for prompt, completion in zip(prompts, completions, strict=True):
        reference.check(prompt, completion)
    return cached


async def _complete(
    service: Service, prompts: list[list[int]], concurrency: int, max_tokens: int
) -> tuple[list[list[int]], int]:
    """Completes all prompts; also the number of prompt tokens that came from the cache."""
    requests = [greedy(ids, max_tokens) for ids in prompts]
    responses = await complete_all(service.grpc_target, requests, concurrency)
    assert all(len(completion) == max_tokens for completion in tokens(responses))
    return tokens(responses), sum(response.finished.usage.cached_tokens for response in responses)


@pytest.mark.slow  # tests/integration/test_greedy_matches_transformers.py has it without the processes
async def test_one_at_a_time_then_all_at_once_with_prefix_hits(
    float32_server: Service, reference: Reference, prompts: list[list[int]]
) -> None:
    first, _ = await _complete(float32_server, prompts, concurrency=1, max_tokens=FIRST_TOKENS)
    cached = await _check(float32_server, reference, prompts, concurrency=16)
    for prompt, completion in zip(prompts, first, strict=True):
        reference.check(prompt, completion)
    full_blocks = sum((len(ids) - 1) // 16 * 16 for ids in prompts)
    assert full_blocks < cached <= sum(len(ids) - 1 for ids in prompts), (
        "the second round finds every full block of every prompt, and most of what is behind them"
    )


@pytest.mark.slow  # tests/integration/test_greedy_matches_transformers.py says the same in seconds
@pytest.mark.parametrize("budget", [7, 33, 100])
async def test_odd_token_budgets_that_cut_prompts_into_chunks(
    budget: int, tmp_path: Path, reference: Reference, prompts: list[list[int]]
) -> None:
    options = ("--dtype", "float32", "--max-num-batched-tokens", str(budget), "--no-enable-prefix-caching")
    with Service(tmp_path, options=options) as service:
        assert await _check(service, reference, prompts, concurrency=16, max_tokens=FEW_TOKENS) == 0


@pytest.mark.slow  # tests/integration/test_group_families.py preempts too
async def test_a_pool_so_small_that_requests_are_preempted(
    tmp_path: Path, reference: Reference, prompts: list[list[int]]
) -> None:
    with Service(
        tmp_path, options=("--dtype", "float32", "--num-blocks", "24", "--max-model-len", "384")
    ) as service:
        await _check(service, reference, prompts, concurrency=16, max_tokens=FEW_TOKENS)
        metrics = service.metrics()
        assert metrics["pagewire:num_preemptions_total"] > 0
        assert metrics["pagewire:kv_cache_used_blocks"] == 0
