"""A classifier through the whole service and through LLM: what it answers is transformers', also when the
worker is killed on the way."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pagewire import LLM, AsyncClient, SamplingParams
from pagewire.base.errors import Unsupported
from tests.integration.tiny_heads import write_classifier
from tests.unit.frontend.conftest import byte_characters
from tools.service import Service

DOCUMENTATION = Path(__file__).resolve().parents[2] / "docs" / "scoring.md"
QUERY = "What is the capital of France?"
DOCUMENTS = ["Paris.", "Berlin is in Germany.", "The capital of France is Paris. " * 3, "é"]


def write_tokenizer(directory: Path) -> None:
    """One token a byte; id 0, which transformers takes for padding, is no byte of a text."""
    vocab = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("cross-encoder")
    reference = write_classifier("qwen3", directory, id2label={0: "relevance"})
    write_tokenizer(directory)
    return directory, reference


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, cross_encoder: tuple[Path, Any]) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("serve")
    with Service(
        directory, model=str(cross_encoder[0]), options=("--max-num-batched-tokens", "48")
    ) as running:
        yield running


def logits(reference: Any, *texts: str) -> torch.Tensor:
    with torch.inference_mode():
        found = [reference(torch.tensor([list(text.encode())])).logits[0] for text in texts]
    return torch.stack(found)


async def test_scores_and_classes_are_transformers_over_both_protocols(
    service: Service, cross_encoder: tuple[Path, Any]
) -> None:
    raw = logits(cross_encoder[1], *(QUERY + text for text in DOCUMENTS))[:, 0]
    expected = pytest.approx(raw.sigmoid().tolist(), rel=1e-4, abs=1e-5)
    async with httpx.AsyncClient(base_url=service.http_url, timeout=60) as http:
        ranked = await http.post("/v1/rerank", json={"query": QUERY, "documents": DOCUMENTS})
        order = [entry["index"] for entry in ranked.json()["results"]]
        assert order == raw.argsort(descending=True).tolist()
        scored = await http.post("/v1/score", json={"text_1": QUERY, "text_2": DOCUMENTS})
        assert [entry["score"] for entry in scored.json()["data"]] == expected
        classified = await http.post(
            "/v1/classify", json={"input": [QUERY + text for text in DOCUMENTS], "use_activation": False}
        )
        values = [entry["probs"][0] for entry in classified.json()["data"]]
        assert values == pytest.approx(raw.tolist(), rel=1e-4, abs=1e-4)
        assert {entry["label"] for entry in classified.json()["data"]} == {"relevance"}
        info = (await http.get("/server_info")).json()["engine"]
        assert (info["task"], info["labels"]) == ("classify", ["relevance"])
        refused = await http.post("/v1/completions", json={"prompt": "a"})
        assert (refused.status_code, "generates no text" in refused.text) == (400, True)
    async with AsyncClient(service.grpc_target) as client:
        assert await client.score(QUERY, DOCUMENTS) == expected
        with pytest.raises(Unsupported, match="generates no text"):
            await client.generate("a", SamplingParams(max_tokens=1))


@pytest.mark.slow  # tests/e2e/test_deaths.py says the same of completions
async def test_classifications_survive_the_death_of_the_worker(
    service: Service, cross_encoder: tuple[Path, Any]
) -> None:
    texts = [f"{number}: {'words ' * 20}" for number in range(200)]
    async with AsyncClient(service.grpc_target) as client:
        answering = asyncio.create_task(client.classify(texts, use_activation=False))
        await asyncio.sleep(0.15)
        assert not answering.done()
        os.kill(service.processes()["engine-worker"].pid, signal.SIGKILL)
        answer = await asyncio.wait_for(answering, 60)
    found = [entry.probs[0] for entry in answer.classifications]
    for number in (0, 99, 199):
        [expected] = logits(cross_encoder[1], texts[number])[:, 0].tolist()
        assert found[number] == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("language", ["sh", "python"])
def test_the_examples_of_the_documentation_work(service: Service, language: str) -> None:
    blocks = re.findall(rf"^```{language}\n(.*?)^```", DOCUMENTATION.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        block = block.replace("http://localhost:8000", service.http_url)
        block = block.replace("localhost:50051", service.grpc_target)
        command = ["bash", "-c", block] if language == "sh" else [sys.executable, "-c", block]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert "error" not in done.stdout
        assert any(word in done.stdout for word in ("score", "probs", "relevance")), done.stdout


def test_llm_classifies_scores_and_refuses_to_generate(cross_encoder: tuple[Path, Any]) -> None:
    directory, reference = cross_encoder
    with LLM(str(directory), device="cpu", dtype="float32", num_blocks=64) as llm:
        assert llm.labels == ("relevance",)
        raw = logits(reference, *(QUERY + text for text in DOCUMENTS))[:, 0]
        assert llm.score(QUERY, DOCUMENTS) == pytest.approx(raw.sigmoid().tolist(), rel=1e-4, abs=1e-5)
        [output] = llm.classify(QUERY + DOCUMENTS[0])
        assert (output.label, output.probs) == (
            "relevance",
            pytest.approx([float(raw[0].sigmoid())], rel=1e-4),
        )
        with pytest.raises(Unsupported, match="generates no text"):
            llm.generate("a")
