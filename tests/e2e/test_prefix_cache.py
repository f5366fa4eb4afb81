"""A prompt whose beginning was served before costs only its rest."""

from __future__ import annotations

from pagewire.inference.v1 import inference_pb2 as pb
from tests.e2e.client import complete_all, tokens
from tests.e2e.prompts import greedy
from tools.service import Service

SHARED = [(17 * index) % 4000 + 300 for index in range(1000)]
BLOCK = 16


async def test_the_second_of_two_requests_computes_only_what_they_do_not_share(server: Service) -> None:
    first, second = [*SHARED, 11, 12, 13], [*SHARED, 21, 22, 23, 24]
    assert len(SHARED) % BLOCK, "they part in the middle of a block"
    (cold,) = await complete_all(server.grpc_target, [greedy(first, 1)], 1)
    before = server.metrics()
    (warm,) = await complete_all(server.grpc_target, [greedy(second, 1)], 1)
    after = server.metrics()
    assert cold.finished.usage.cached_tokens == 0
    assert warm.finished.usage.cached_tokens == len(SHARED)
    assert warm.finished.usage.prompt_tokens == len(second)
    computed = after["pagewire:computed_tokens_total"] - before["pagewire:computed_tokens_total"]
    assert computed == len(second) - len(SHARED)
    hits = after["pagewire:prefix_cache_hits_total"] - before["pagewire:prefix_cache_hits_total"]
    assert hits == len(SHARED)


async def test_the_last_token_is_computed_even_when_every_block_is_cached(server: Service) -> None:
    prompt = [(23 * index) % 4000 + 300 for index in range(4 * BLOCK)]
    cold, warm = await complete_all(server.grpc_target, [greedy(prompt, 8)] * 2, 1)
    assert warm.finished.usage.cached_tokens == len(prompt) - 1
    assert tokens([warm]) == tokens([cold])


async def test_requests_that_come_together_share_what_the_first_of_them_computes(server: Service) -> None:
    prompt = [(29 * index) % 4000 + 300 for index in range(200)]
    together = await complete_all(
        server.grpc_target, [greedy([*prompt, tail], 8) for tail in range(500, 506)], 6
    )
    alone = await complete_all(
        server.grpc_target, [greedy([*prompt, tail], 8) for tail in range(500, 506)], 1
    )
    assert tokens(together) == tokens(alone)
    assert sum(answer.finished.usage.cached_tokens for answer in together) >= 5 * (200 // BLOCK * BLOCK) // 2


async def test_the_next_turn_computes_what_is_new(server: Service) -> None:
    prompt = [(31 * index) % 4000 + 300 for index in range(2 * BLOCK + 5)]
    (answer,) = await complete_all(server.grpc_target, [greedy(prompt, 7)], 1)
    (generated,) = tokens([answer])
    turn = [*prompt, *generated, 700, 701, 702]
    before = server.metrics()["pagewire:computed_tokens_total"]
    (next_answer,) = await complete_all(server.grpc_target, [greedy(turn, 1)], 1)
    computed = server.metrics()["pagewire:computed_tokens_total"] - before
    # The last token of an answer was not computed for it.
    assert computed == 1 + 3
    assert next_answer.finished.usage.cached_tokens == len(turn) - computed


async def test_a_beam_computes_a_token_a_step(server: Service) -> None:
    width, length = 3, 20
    prompt = [(37 * index) % 4000 + 300 for index in range(BLOCK + 6)]
    sampling = pb.SamplingParams(max_tokens=length, n=width, ignore_eos=True, beam_search=pb.BeamSearch())
    before = server.metrics()
    await complete_all(
        server.grpc_target, [pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling)], 1
    )
    after = server.metrics()
    computed = after["pagewire:computed_tokens_total"] - before["pagewire:computed_tokens_total"]
    assert computed == len(prompt) + width * (length - 1)
    assert after["pagewire:steps_total"] - before["pagewire:steps_total"] == length
