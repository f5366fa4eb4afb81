"""Adapters on the CPU: what they make of a model is what PEFT merges, in fp32, in any company."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.dispatch.records import TokenLogprobs
from engine.dispatch.sampling import SamplingRecord
from pagewire.base.errors import InvalidRequest
from scheduler.request import Request
from tests.integration.core_driver import CoreDriver
from tests.integration.tiny_adapters import KINDS, merged, write_adapter
from tests.integration.tiny_families import VOCAB, write_tiny

NUM_TOP = 4
OUTPUT_TOKENS = 6
PROMPTS = [[(7 * i + n) % VOCAB for i in range(length)] for n, length in enumerate((1, 5, 17, 33, 41))]
SAMPLING = SamplingRecord(temperature=0.0, logprobs=NUM_TOP)
SETTINGS = {"enable_lora": True, "max_lora_rank": 16, "max_num_batched_tokens": 37, "num_blocks": 160}
Logits = Callable[[list[int]], torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def driver(base: Path) -> CoreDriver:
    return CoreDriver(base, max_loras=3, **SETTINGS)


@pytest.fixture(scope="module")
def eight(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of different kinds and ranks."""
    kinds = ["plain", "attention", "patterns", "rslora", "dora", "all-linear", "biases", "embeddings"]
    directory = tmp_path_factory.mktemp("eight")
    return [
        write_adapter(base, kind, directory / str(number), seed=number) for number, kind in enumerate(kinds)
    ]


def logits_of(base: Path, *adapters: Path) -> Logits:
    model = merged(base, *adapters)

    @torch.inference_mode()
    def logits(tokens: list[int]) -> torch.Tensor:
        result: torch.Tensor = model(torch.tensor([tokens])).logits[0]
        return result

    return logits


def check(served: list[tuple[Request, list[TokenLogprobs]]], logits: Logits) -> None:
    for request, told in served:
        tokens, start = request.token_ids.tolist(), request.num_prompt_tokens
        expected = logits(tokens).log_softmax(-1)[start - 1 : -1]
        best = expected.topk(NUM_TOP)
        assert len(told) == OUTPUT_TOKENS
        for index, entry in enumerate(told):
            assert list(entry.top_logprobs) == pytest.approx(best.values[index].tolist(), abs=1e-4)
            assert expected[index, tokens[start + index]].item() == pytest.approx(
                best.values[index, 0].item(), abs=1e-4
            )


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_computes_what_the_merged_model_does(
    kind: str, base: Path, driver: CoreDriver, tmp_path: Path
) -> None:
    write_adapter(base, kind, tmp_path)
    number = 100 + list(KINDS).index(kind)
    driver.load(number, tmp_path)
    served = driver.generate(PROMPTS, OUTPUT_TOKENS, SAMPLING, [number] * len(PROMPTS))
    check(served, logits_of(base, tmp_path))
    plain = driver.generate(PROMPTS, OUTPUT_TOKENS, SAMPLING)
    check(plain, logits_of(base))
    assert any(
        list(a.top_logprobs) != pytest.approx(list(b.top_logprobs), abs=1e-3)
        for (_, ours), (_, theirs) in zip(served, plain, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    driver.drop(number)


def test_eight_adapters_and_the_base_in_one_service_are_each_what_they_are_alone(
    base: Path, driver: CoreDriver, eight: list[Path]
) -> None:
    """There are three slots: adapters come and go while requests with others run."""
    for number, directory in enumerate(eight, start=1):
        driver.load(number, directory)
    numbers = list(range(9)) * 2
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(len(numbers))]
    served = driver.generate(prompts, OUTPUT_TOKENS, SAMPLING, numbers)
    for number in range(9):
        logits = logits_of(base, *eight[number - 1 : number] if number else ())
        check([each for each, own in zip(served, numbers, strict=True) if own == number], logits)
    for number in range(1, 9):
        driver.drop(number)


def test_a_prefix_is_found_by_requests_with_the_same_adapter_only(
    driver: CoreDriver, eight: list[Path]
) -> None:
    driver.load(1, eight[0])
    prompt = [(13 * i + 5) % VOCAB for i in range(40)]
    cached = []
    for adapter_id in (0, 1, 1, 0):
        [(request, _)] = driver.generate([prompt], OUTPUT_TOKENS, SAMPLING, [adapter_id])
        cached.append(request.num_cached_tokens)
    assert cached[:2] == [0, 0]
    assert min(cached[2:]) >= 32
    driver.drop(1)


def test_what_does_not_fit_the_base_is_refused(
    base: Path, driver: CoreDriver, eight: list[Path], tmp_path: Path
) -> None:
    other = write_tiny("qwen3", tmp_path / "other")
    write_adapter(other, "plain", tmp_path / "adapter")
    with pytest.raises(
        InvalidRequest, match=r"is for a matrix of 64 inputs and \d+ outputs; the base model.s has 64 and"
    ):
        driver.load(50, tmp_path / "adapter")
    phi = write_tiny("phi3", tmp_path / "phi")
    write_adapter(phi, "all-linear", tmp_path / "of phi")
    with pytest.raises(InvalidRequest, match=r"the base model has no 'model.layers.0.*qkv_proj'"):
        driver.load(51, tmp_path / "of phi")
    with pytest.raises(InvalidRequest, match=r"no adapter_config\.json"):
        driver.load(52, phi)


def test_modules_that_checkpoints_fuse_have_one_a_for_all_of_their_matrices(tmp_path: Path) -> None:
    base = write_tiny("phi3", tmp_path / "base")
    adapter = write_adapter(base, "all-linear", tmp_path / "adapter")
    driver = CoreDriver(base, max_loras=1, **SETTINGS)
    driver.load(1, adapter)
    served = driver.generate(PROMPTS[:3], OUTPUT_TOKENS, SAMPLING, [1, 1, 1])
    check(served, logits_of(base, adapter))


@pytest.mark.slow
def test_a_thousand_loads_and_unloads_leak_nothing(
    base: Path, driver: CoreDriver, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import psutil

    directory = tmp_path_factory.mktemp("thousand")
    paths = [write_adapter(base, "plain", directory / str(seed), seed=seed) for seed in range(2)]
    process = psutil.Process()
    before = (0, 0)
    for turn in range(1000):
        number = 1000 + turn
        driver.load(number, paths[turn % 2])
        if turn % 100 == 0:
            driver.generate(PROMPTS[:1], 2, SamplingRecord(temperature=0.0), [number])
        driver.drop(number)
        if turn == 200:
            before = (process.memory_info().rss, process.num_fds())
    assert driver.adapters is not None
    assert driver.adapters.loaded == ()
    assert process.num_fds() <= before[1]
    assert process.memory_info().rss - before[0] < 16 * 2**20
