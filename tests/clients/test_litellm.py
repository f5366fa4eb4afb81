"""litellm with a base URL of ours: plain, streamed, tools, structured output, errors."""

from __future__ import annotations

import json

import pytest

from tests.clients.conftest import City
from tools.service import Service

pytestmark = pytest.mark.slow  # importing it takes long; pydantic-ai and instructor stand for such clients

ASKED = [{"role": "user", "content": "Name the capital of France."}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tell the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def litellm():
    """Imported here, because it takes seconds, and every process that runs tests collects this file."""
    return pytest.importorskip("litellm")


@pytest.fixture
def ask(litellm, server: Service, base_url: str):
    def ask(**changes):
        return litellm.completion(
            **{
                "model": f"openai/{server.model}",
                "api_base": base_url,
                "api_key": "-",
                "messages": ASKED,
                "temperature": 0,
                "max_tokens": 48,
                "num_retries": 0,
                **changes,
            }
        )

    return ask


def test_a_question_is_answered_whole_and_streamed(litellm, ask) -> None:
    whole = ask()
    assert "Paris" in whole.choices[0].message.content
    streamed = litellm.stream_chunk_builder(list(ask(stream=True)), messages=ASKED)
    assert streamed.choices[0].message.content == whole.choices[0].message.content


def test_a_tool_is_called_and_the_whole_history_is_taken_back(ask) -> None:
    asked = [{"role": "user", "content": "What is the weather in Paris?"}]
    choice = {"type": "function", "function": {"name": "get_weather"}}
    called = ask(messages=asked, tools=[TOOL], tool_choice=choice).choices[0].message
    [call] = called.tool_calls
    assert set(json.loads(call.function.arguments)) == {"city"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "It is sunny."}
    answer = ask(messages=[*asked, called.model_dump(), result], tools=[TOOL])
    assert answer.choices[0].finish_reason in ("stop", "tool_calls", "length")


def test_a_structured_answer_is_of_its_model(ask) -> None:
    answer = ask(response_format=City, max_tokens=96)
    City.model_validate_json(answer.choices[0].message.content)


def test_what_is_refused_is_raised_as_a_bad_request(litellm, ask) -> None:
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        ask(temperature=-1)
    with pytest.raises(litellm.NotFoundError, match="no-such-model"):
        ask(model="openai/no-such-model")
