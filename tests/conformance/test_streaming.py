"""A streamed answer is the whole one: in text, calls, log probabilities, reasons and usage."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.conformance.streams import from_chunks, from_whole
from tests.conformance.target import Target

PROMPTS = ["The capital of France is", "Once upon a time, in a small village by the sea,"]
MESSAGES = [{"role": "user", "content": "Name a colour."}]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "warm": {"type": "boolean"}},
    "required": ["colour", "warm"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "colour", "schema": SCHEMA, "strict": True}}
TOOLS = [{"type": "function", "function": {"name": "paint", "parameters": SCHEMA}}]
PAINT = {"type": "function", "function": {"name": "paint"}}


def extension(**fields: Any) -> Any:
    return pytest.param(fields, marks=pytest.mark.extension)


def check(target: Target, **asked: Any) -> dict[str, Any]:
    """What both answers say, which is the same."""
    answer = target.chat if "messages" in asked else target.completion
    answer(**asked | {"max_tokens": 1})  # from here on both find the prompt cached
    whole = from_whole(answer(**asked))
    assert from_chunks(target.chunks(**asked)) == whole
    return whole


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"n": 2, "logprobs": 2},
        {"stop": ["i", ","]},
        {"echo": True, "logprobs": 1},
        extension(stop=[" in", " the"], include_stop_str_in_output=True, return_token_ids=True),
        extension(echo=True, prompt_logprobs=1, n=2, return_token_ids=True),
        extension(n=2, use_beam_search=True, logprobs=1),
        extension(structured_outputs={"regex": "[a-z]{3}( [a-z]{2}){2}"}),
    ],
    ids=lambda fields: "-".join(fields) or "plain",
)
def test_a_streamed_completion_is_the_whole_one(target: Target, extra: dict[str, Any]) -> None:
    asked = {"prompt": PROMPTS, "seed": 3, "temperature": 1, "max_tokens": 8}
    said = check(target, **{**asked, **extra})
    assert len(said["choices"]) == 2 * extra.get("n", 1)
    assert any(choice["text"] for choice in said["choices"].values())


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"n": 3, "logprobs": True, "top_logprobs": 2, "temperature": 1.5},
        {"stop": ["a", "e"]},
        {"response_format": FORMAT, "logprobs": True, "max_tokens": 40},
        {"tools": TOOLS, "tool_choice": PAINT, "max_tokens": 40},
        {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 60},
        extension(return_token_ids=True),
    ],
    ids=lambda fields: "-".join(fields) or "plain",
)
def test_a_streamed_chat_is_the_whole_one(target: Target, extra: dict[str, Any]) -> None:
    asked = {"messages": MESSAGES, "seed": 4, "temperature": 1, "max_tokens": 8}
    said = check(target, **{**asked, **extra})["choices"]
    assert len(said) == extra.get("n", 1)
    if "tools" in extra:
        assert {choice["finish_reason"] for choice in said.values()} == {"tool_calls"}
        assert said[0]["calls"][0]["name"] == "paint"


def test_usage_comes_only_if_asked_for(target: Target) -> None:
    asked: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 2}
    assert all(
        chunk.usage is None for chunk in target.chunks(**asked, stream_options={"include_usage": False})
    )
    assert all(chunk.usage is None for chunk in target.chunks(**asked)[:-1])


@pytest.mark.extension
def test_usage_comes_with_every_chunk_if_asked_for(target: Target) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        chunk.usage.completion_tokens
        for chunk in target.chunks(prompt="1, 2,", max_tokens=4, stream_options=options)
    ]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 4)


def test_a_stream_that_nobody_reads_any_more_does_no_harm(target: Target) -> None:
    stream = target.completion(prompt=PROMPTS[1], stream=True, max_tokens=2000)
    next(iter(stream))
    stream.close()  # type: ignore[attr-defined]
    assert target.choice(prompt=PROMPTS[0], max_tokens=2).text


async def test_streams_run_side_by_side(target: Target) -> None:
    async with openai.AsyncOpenAI(base_url=f"{target.root}/v1", api_key=target.api_key) as client:

        async def one(number: int) -> str:
            stream = await client.completions.create(
                model=target.model, prompt=f"{number}:", temperature=0, max_tokens=8, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        together = await asyncio.gather(*(one(number) for number in range(4)))
        assert together == [await one(number) for number in range(4)]
