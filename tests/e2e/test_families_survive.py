"""Models whose layers differ in reach and models of experts, through the whole service: requests that are
preempted, and requests whose worker is killed, get the tokens that they get undisturbed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.dispatch.sampling import SamplingRecord
from pagewire.inference.v1 import inference_pb2 as pb
from tests.e2e.client import complete_all, tokens
from tests.e2e.prompts import greedy
from tests.e2e.test_deaths import kill, streams
from tests.e2e.test_lifecycle import until_idle
from tests.e2e.test_scoring import write_tokenizer
from tests.integration.core_driver import CoreDriver
from tests.integration.tiny_families import write_tiny
from tools.service import Service

# tests/integration/test_group_families.py says the same of workers under a scheduler, in `make test` too.
pytestmark = pytest.mark.slow

MAX_TOKENS = 60
SHARED = [(7 * index + 3) % 256 for index in range(37)]
PROMPTS = [
    *([*SHARED, number] for number in range(4)),
    *([(11 * index + length) % 256 for index in range(length)] for length in (3, 20, 41, 70)),
]
REQUESTS = [greedy(prompt, MAX_TOKENS) for prompt in PROMPTS]
# Model -> KV blocks, which are too few for all requests. The longest, of 130 tokens, takes 9 where layers see
# everything, and few where all have a window. gpt-oss has windows, experts and sinks at once.
POOLS = {"gpt-oss": 40, "gemma3": 40, "mistral": 10, "qwen2-moe": 40}


@pytest.fixture(scope="module", params=POOLS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Service, list[list[int]]]]:
    """A service, and what each request gets undisturbed."""
    directory = tmp_path_factory.mktemp(request.param)
    # With tied embeddings so small a model repeats its input.
    model = write_tiny(request.param, directory / "model", tie_word_embeddings=False)
    write_tokenizer(model)
    undisturbed = CoreDriver(model, num_blocks=400).generate(
        PROMPTS, MAX_TOKENS, SamplingRecord(temperature=0.0)
    )
    expected = [request.token_ids[request.num_prompt_tokens :].tolist() for request, _ in undisturbed]
    assert any(len(set(each)) > 8 for each in expected), "too easy"
    options = ("--num-blocks", str(POOLS[request.param]), "--max-model-len", "160")
    options += ("--max-num-batched-tokens", "48")
    with Service(directory, model=str(model), options=options) as running:
        yield running, expected


async def test_preempted_requests_get_the_same_tokens(served: tuple[Service, list[list[int]]]) -> None:
    service, expected = served
    responses = await complete_all(service.grpc_target, REQUESTS, len(REQUESTS))
    assert tokens(responses) == expected
    assert (await until_idle(service))["pagewire:num_preemptions_total"] > 0


async def test_streams_go_on_with_the_same_tokens_when_the_worker_is_killed(
    served: tuple[Service, list[list[int]]],
) -> None:
    service, expected = served
    async with streams(service, REQUESTS) as opened:
        await opened.until_each_has(1)
        before = [len(each) for each in opened.received]
        kill("engine-worker")(service)
        outcomes = await opened.outcomes()
    assert min(before) < MAX_TOKENS, "it came too late"
    assert opened.received == expected
    assert all(isinstance(each, pb.Finished) for each in outcomes), outcomes
    metrics = await until_idle(service)
    assert metrics["pagewire:requests_quarantined_total"] == 0
