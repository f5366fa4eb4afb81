"""A prompt whose beginning was served before costs only its rest."""

from __future__ import annotations

from tests.e2e.client import complete_all, tokens
from tests.e2e.prompts import greedy
from tools.service import Service

SHARED = [(17 * index) % 4000 + 300 for index in range(1000)]
BLOCK = 16


async def test_the_second_of_two_requests_computes_only_what_they_do_not_share(server: Service) -> None:
    first, second = [*SHARED, 11, 12, 13], [*SHARED, 21, 22, 23, 24]
    cached = len(SHARED) // BLOCK * BLOCK
    (cold,) = await complete_all(server.grpc_target, [greedy(first, 1)], 1)
    before = server.metrics()
    (warm,) = await complete_all(server.grpc_target, [greedy(second, 1)], 1)
    after = server.metrics()
    assert cold.finished.usage.cached_tokens == 0
    assert warm.finished.usage.cached_tokens == cached
    assert warm.finished.usage.prompt_tokens == len(second)
    computed = after["pagewire:computed_tokens_total"] - before["pagewire:computed_tokens_total"]
    assert computed == len(second) - cached
    hits = after["pagewire:prefix_cache_hits_total"] - before["pagewire:prefix_cache_hits_total"]
    assert hits == cached


async def test_the_last_token_is_computed_even_when_every_block_is_cached(server: Service) -> None:
    prompt = [(23 * index) % 4000 + 300 for index in range(4 * BLOCK)]
    cold, warm = await complete_all(server.grpc_target, [greedy(prompt, 8)] * 2, 1)
    assert warm.finished.usage.cached_tokens == 3 * BLOCK
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
