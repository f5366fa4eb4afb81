"""`pagewire serve --batching-strategy`: every strategy serves the same tokens, whatever is asked for."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from pagewire import LLM, SamplingParams
from pagewire.wire.sampling_params import BeamSearch
from tools.service import Service

NULL = ("--engine", "null", "--max-num-seqs", "4", "--max-num-batched-tokens", "32")
BODIES: list[dict[str, Any]] = [
    {"prompt": "Once", "max_tokens": 30, "seed": 4},
    {"prompt": list(range(100, 190)), "max_tokens": 5, "seed": 5},
    {"prompt": "Several", "max_tokens": 10, "seed": 6, "n": 6, "temperature": 1},
    {"prompt": ["One", "Two"], "max_tokens": 10, "seed": 7},
    {"prompt": "Beams", "max_tokens": 6, "n": 2, "use_beam_search": True, "temperature": 0},
    {"prompt": "Pick", "max_tokens": 20, "structured_outputs": {"choice": ["left"]}},
]


@pytest.mark.parametrize(
    "strategy",
    [
        each if each == "static" else pytest.param(each, marks=pytest.mark.slow)
        for each in ("none", "static", "dynamic")
    ],
)
async def test_a_strategy_serves_the_tokens_that_the_default_does(
    null_service: Service, tmp_path: Path, strategy: str
) -> None:
    delay = ("--max-queue-delay-microseconds", "20000") if strategy in ("static", "dynamic") else ()
    options = (*NULL, "--batching-strategy", strategy, *delay)
    with Service(tmp_path, options=options) as service:
        async with httpx.AsyncClient(timeout=30) as client:

            async def texts(url: str, body: dict[str, Any]) -> list[str]:
                answer = (await client.post(f"{url}/v1/completions", json=body)).raise_for_status().json()
                return [choice["text"] for choice in answer["choices"]]

            answers = await asyncio.gather(*(texts(service.http_url, body) for body in BODIES * 2))
            expected = await asyncio.gather(*(texts(null_service.http_url, body) for body in BODIES))
            assert answers == expected * 2
            body = {"model": service.model, "input": ["a"] * 9, "pooling": "mean"}
            vectors = await client.post(f"{service.http_url}/v1/embeddings", json=body)
            assert len(vectors.raise_for_status().json()["data"]) == 9
        metrics = service.metrics()
        assert metrics[f'pagewire:batching_info{{strategy="{strategy}"}}'] == 1
        assert metrics["pagewire:batches_total"] > 0
        plain = null_service.metrics()
        assert plain['pagewire:batching_info{strategy="inflight"}'] == 1
        assert plain["pagewire:batches_total"] == 0
        assert metrics["pagewire:num_requests_waiting"] == 0


def test_offline_prompts_samples_and_beams_are_completed_in_batches(smollm2_dir: Path) -> None:
    params = [
        SamplingParams(max_tokens=12, seed=1),
        SamplingParams(max_tokens=6, seed=2, n=5),
        SamplingParams(max_tokens=4, n=2, temperature=0, beam_search=BeamSearch()),
        *(SamplingParams(max_tokens=5, seed=seed) for seed in range(3)),
    ]
    with LLM(str(smollm2_dir), engine="null", max_num_seqs=4, batching_strategy="static") as llm:
        outputs = llm.generate([[number + 1] * 5 for number in range(len(params))], params)
    assert [len(output.outputs) for output in outputs] == [1, 5, 2, 1, 1, 1]
    for output, wanted in zip(outputs, params, strict=True):
        assert all(len(each.token_ids) == wanted.max_tokens for each in output.outputs)
