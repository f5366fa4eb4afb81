"""The official openai Python SDK against a real server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.http_url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_chat_answers_a_question(server: Any, client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model=server.model, messages=MESSAGES, temperature=0, max_tokens=16
    )
    (choice,) = completion.choices
    assert "Paris" in choice.message.content
    assert choice.finish_reason in ("stop", "length")
    usage = completion.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens >= 0


def test_chat_stream_equals_the_whole_completion(server: Any, client: openai.OpenAI) -> None:
    request = {"model": server.model, "messages": MESSAGES, "temperature": 0, "max_completion_tokens": 16}
    whole = client.chat.completions.create(**request)
    stream = client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 3
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert [reason for reason in reasons if reason] == [whole.choices[0].finish_reason]


def test_completions_stream_equals_the_whole(server: Any, client: openai.OpenAI) -> None:
    request = {"model": server.model, "prompt": "Once upon a time", "temperature": 0, "max_tokens": 16}
    whole = client.completions.create(**request)
    assert whole.usage.completion_tokens == 16
    assert whole.choices[0].finish_reason == "length"
    assert whole.choices[0].text == "".join(
        chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)
    )


def test_stop_seed_and_logprobs(server: Any, client: openai.OpenAI) -> None:
    request = {"model": server.model, "prompt": "1, 2, 3,", "max_tokens": 24}
    stopped = client.completions.create(**request, temperature=0, stop=[" 6"])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text.strip() == "4, 5,"
    seeded = [client.completions.create(**request, temperature=1.0, seed=7).choices[0].text for _ in range(2)]
    assert seeded[0] == seeded[1]
    scored = client.chat.completions.create(
        model=server.model, messages=MESSAGES, temperature=0, max_tokens=3, logprobs=True, top_logprobs=2
    )
    content = scored.choices[0].logprobs.content
    assert len(content) == scored.usage.completion_tokens
    for position in content:
        assert len(position.top_logprobs) == 2
        assert position.top_logprobs[0].logprob >= position.top_logprobs[1].logprob
        assert position.logprob == position.top_logprobs[0].logprob <= 0  # greedy takes the likeliest


def test_extra_sampling_parameters(server: Any, client: openai.OpenAI) -> None:
    completion = client.completions.create(
        model=server.model,
        prompt=[1, 2, 3],
        max_tokens=4,
        extra_body={"top_k": 1, "ignore_eos": True, "allowed_token_ids": [42]},
    )
    assert completion.usage.completion_tokens == 4


def test_models(server: Any, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [server.model]
    assert client.models.retrieve(server.model).id == server.model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_errors_are_the_sdks_own(server: Any, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature is") as wrong:
        client.chat.completions.create(model=server.model, messages=MESSAGES, temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="n is 0"):
        client.chat.completions.create(model=server.model, messages=MESSAGES, n=0)
    with pytest.raises(openai.BadRequestError, match="Unrecognized request argument supplied: foo"):
        client.chat.completions.create(model=server.model, messages=MESSAGES, extra_body={"foo": 1})


async def test_async_streams_run_side_by_side(server: Any) -> None:
    import asyncio

    async with openai.AsyncOpenAI(base_url=f"{server.http_url}/v1", api_key="unused") as client:

        async def one(number: int) -> str:
            stream = await client.completions.create(
                model=server.model, prompt=f"{number}:", temperature=0, max_tokens=8, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        together = await asyncio.gather(*(one(number) for number in range(8)))
        assert together == [await one(number) for number in range(8)]
