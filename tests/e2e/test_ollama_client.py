"""Ollama's own Python client, unmodified, against the whole service."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import httpx
import ollama
import pydantic
import pytest

from tools.service import Service

QUESTION = {"role": "user", "content": "Name the capital of France."}
GREEDY = {"temperature": 0, "num_predict": 12}


class Town(pydantic.BaseModel, extra="forbid"):
    """What an answer is held to."""

    capital: bool
    language: Literal["German", "French"]


@pytest.fixture(scope="module")
def client(server: Service) -> Iterator[ollama.Client]:
    with ollama.Client(server.http_url) as client:
        yield client


def test_a_chat_says_what_openais_api_says(client: ollama.Client, server: Service) -> None:
    body = {"messages": [QUESTION], "temperature": 0, "max_tokens": 12}
    openai = httpx.post(f"{server.http_url}/v1/chat/completions", json=body, timeout=60).json()
    whole = client.chat(f"{server.model}:latest", [QUESTION], options=GREEDY)
    *texts, last = client.chat(server.model, [QUESTION], options=GREEDY, stream=True)
    assert whole.message.content == openai["choices"][0]["message"]["content"]
    assert "".join(part.message.content for part in texts) == whole.message.content
    assert "Paris" in whole.message.content
    for answer in (whole, last):
        assert answer.prompt_eval_count == openai["usage"]["prompt_tokens"]
        assert answer.eval_count == openai["usage"]["completion_tokens"]
        assert 0 < answer.prompt_eval_duration + answer.eval_duration < answer.total_duration


def test_a_context_goes_on_as_the_conversation_does(client: ollama.Client, server: Service) -> None:
    first = client.generate(server.model, QUESTION["content"], options={"temperature": 0, "num_predict": 64})
    again = client.generate(server.model, "And of Italy?", context=first.context, options=GREEDY)
    turns = [QUESTION, {"role": "assistant", "content": first.response}]
    chat = client.chat(server.model, [*turns, {"role": "user", "content": "And of Italy?"}], options=GREEDY)
    assert again.response == chat.message.content
    assert again.prompt_eval_count == chat.prompt_eval_count


def test_a_schema_holds_the_answer(client: ollama.Client, server: Service) -> None:
    answer = client.chat(
        server.model,
        [{"role": "user", "content": "Tell me of Bern as JSON."}],
        format=Town.model_json_schema(),
        options={"temperature": 0, "num_predict": 64},
    )
    Town.model_validate_json(answer.message.content)


def test_the_model_is_told_of_as_it_is(client: ollama.Client, server: Service) -> None:
    (listed,) = client.list().models
    (running,) = client.ps().models
    shown = client.show(server.model)
    assert (listed.model, running.model) == (f"{server.model}:latest",) * 2
    assert (listed.details.family, listed.details.parameter_size) == ("llama", "134.52M")
    assert (listed.details.quantization_level, listed.size > 9 * 10**7) == ("Q4_1", True)
    assert (running.size_vram, running.context_length) == (0, 8192)
    assert shown.modelinfo["llama.block_count"] == 30
    assert "completion" in shown.capabilities
