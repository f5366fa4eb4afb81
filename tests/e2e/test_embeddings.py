"""Embeddings are transformers' hidden states, pooled, through the whole service."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch

from pagewire.inference.v1 import inference_pb2 as pb
from tests.conformance.reference import reference_model
from tests.e2e.client import complete_all
from tools.service import Service

SHORT = [
    "A",
    "The quick brown fox jumps over the lazy dog.",
    "Paged attention keeps keys and values in blocks. " * 6,
]
LONG = "Vectors of hidden states, pooled over chunks of a prompt that no step computes whole. " * 120
"""More tokens than one step computes (--max-num-batched-tokens)."""


@pytest.fixture(scope="module")
def expected(smollm2_float32_dir: Path) -> list[dict[str, np.ndarray]]:
    """For each short text: transformers' last hidden states in float32, pooled in each way."""
    return pooled_by_transformers(smollm2_float32_dir, SHORT)


def pooled_by_transformers(directory: Path, texts: list[str]) -> list[dict[str, np.ndarray]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = reference_model(directory).model  # without its head
    pooled = []
    for text in texts:
        with torch.inference_mode():
            states = model(torch.tensor([tokenizer(text).input_ids])).last_hidden_state[0]
        ways = {"last": states[-1], "mean": states.mean(dim=0), "cls": states[0]}
        pooled.append({name: vector.numpy() for name, vector in ways.items()})
    torch.set_num_threads(threads)
    return pooled


@pytest.fixture
def client(float32_server: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{float32_server.http_url}/v1", api_key="-", max_retries=0, timeout=120)


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_hidden_states_are_transformers(
    client: openai.OpenAI, float32_server: Service, expected, pooling: str
) -> None:
    body = {"pooling": pooling, "normalize": False}
    for encoding in ("float", "base64"):
        answer = client.embeddings.create(
            model=float32_server.model, input=SHORT, encoding_format=encoding, extra_body=body
        )
        for entry, ways in zip(answer.data, expected, strict=False):
            vector = (
                entry.embedding if encoding == "float" else np.frombuffer(b64decode(entry.embedding), "<f4")
            )
            np.testing.assert_allclose(vector, ways[pooling], rtol=2e-4, atol=2e-4)


@pytest.mark.slow  # tests/unit/engine/test_prompt_states.py says the same in seconds
def test_a_mean_over_several_steps_is_transformers(
    client: openai.OpenAI, float32_server: Service, smollm2_float32_dir: Path
) -> None:
    body = {"pooling": "mean", "normalize": False}
    [expected] = pooled_by_transformers(smollm2_float32_dir, [LONG])
    answer = client.embeddings.create(model=float32_server.model, input=LONG, extra_body=body)
    np.testing.assert_allclose(answer.data[0].embedding, expected["mean"], rtol=2e-4, atol=2e-4)


def test_vectors_are_scaled_to_length_one_and_shortened(client, float32_server: Service, expected) -> None:
    body = {"pooling": "mean"}
    whole = (
        client.embeddings.create(model=float32_server.model, input=SHORT[1], extra_body=body)
        .data[0]
        .embedding
    )
    short = client.embeddings.create(
        model=float32_server.model, input=SHORT[1], dimensions=100, extra_body=body
    )
    vector = expected[1]["mean"]
    np.testing.assert_allclose(whole, vector / np.linalg.norm(vector), atol=1e-5)
    begin = vector[:100]
    np.testing.assert_allclose(short.data[0].embedding, begin / np.linalg.norm(begin), atol=1e-5)


async def test_embeddings_and_generation_share_steps_without_harm(float32_server: Service, expected) -> None:
    """Vectors that are asked for while completions run are the same, and so are the completions."""
    sampling = pb.SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    request = pb.GenerateRequest(text=SHORT[1], sampling=sampling)
    alone = await complete_all(float32_server.grpc_target, [request], 1)
    generating = asyncio.create_task(complete_all(float32_server.grpc_target, [request] * 4, 4))
    body = {"input": SHORT * 2, "pooling": "mean", "normalize": False}
    async with httpx.AsyncClient(timeout=120) as http:
        answer = (await http.post(f"{float32_server.http_url}/v1/embeddings", json=body)).json()
    for entry, ways in zip(answer["data"], expected * 2, strict=True):
        np.testing.assert_allclose(entry["embedding"], ways["mean"], rtol=2e-4, atol=2e-4)
    assert {tuple(each.token_ids) for each in await generating} == {tuple(alone[0].token_ids)}


def test_a_model_that_is_not_made_for_it_is_not_embedded_unasked(client, float32_server: Service) -> None:
    with pytest.raises(openai.BadRequestError, match="not made for embeddings"):
        client.embeddings.create(model=float32_server.model, input="a")
