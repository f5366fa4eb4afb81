"""langchain-openai: ChatOpenAI plain, streamed, with tools and with structured output."""

from __future__ import annotations

import pytest

from tests.clients.conftest import City, get_weather
from tools.service import Service

pytestmark = pytest.mark.slow  # importing it takes long; pydantic-ai and instructor stand for such clients

QUESTION = "Name the capital of France."


@pytest.fixture
def chat(server: Service, base_url: str):
    # Imported here, because it takes seconds, and every process that runs tests collects this file.
    langchain_openai = pytest.importorskip("langchain_openai")
    return langchain_openai.ChatOpenAI(
        model=server.model, base_url=base_url, api_key="-", temperature=0, max_tokens=48, max_retries=0
    )


def test_a_question_is_answered_whole_and_streamed(chat) -> None:
    whole = chat.invoke(QUESTION)
    assert "Paris" in whole.content
    assert whole.usage_metadata["output_tokens"] > 0
    chunks = list(chat.stream(QUESTION))
    assert "".join(chunk.content for chunk in chunks) == whole.content
    assert len(chunks) > 3


def test_a_tool_is_called_and_its_result_is_taken_back(chat) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    weather = tool(get_weather)
    asked = HumanMessage("What is the weather in Paris?")
    called = chat.bind_tools([weather], tool_choice="get_weather").invoke([asked])
    [call] = called.tool_calls
    assert call["name"] == "get_weather"
    assert set(call["args"]) == {"city"}
    result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
    # And on, free to call again or not.
    answer = chat.bind_tools([weather]).invoke([asked, called, result])
    assert answer.content or answer.tool_calls


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_a_structured_answer_is_of_its_model(chat, method: str) -> None:
    city = chat.with_structured_output(City, method=method).invoke("Describe Paris, the capital of France.")
    assert isinstance(city, City)


async def test_streams_and_batches_run_without_blocking(chat) -> None:
    pieces = [chunk.content async for chunk in chat.astream(QUESTION)]
    assert "Paris" in "".join(pieces)
    answers = await chat.abatch([QUESTION, QUESTION])
    assert [each.content for each in answers] == ["".join(pieces)] * 2
