"""pydantic-ai: agents that answer plainly, in streams, with tools and as models of pydantic."""

from __future__ import annotations

import pytest

from tests.clients.conftest import City, get_weather
from tools.service import Service

pydantic_ai = pytest.importorskip("pydantic_ai")

from pydantic_ai.exceptions import UsageLimitExceeded  # noqa: E402
from pydantic_ai.messages import ModelResponse, ToolCallPart  # noqa: E402
from pydantic_ai.models.openai import OpenAIChatModel  # noqa: E402
from pydantic_ai.providers.openai import OpenAIProvider  # noqa: E402
from pydantic_ai.usage import UsageLimits  # noqa: E402

QUESTION = "Name the capital of France."
SETTINGS = {"temperature": 0, "max_tokens": 96}


@pytest.fixture
def model(server: Service, base_url: str):
    return OpenAIChatModel(server.model, provider=OpenAIProvider(base_url=base_url, api_key="-"))


async def test_a_question_is_answered_whole_and_streamed(model) -> None:
    agent = pydantic_ai.Agent(model, model_settings=SETTINGS)
    whole = await agent.run(QUESTION)
    assert "Paris" in whole.output
    async with agent.run_stream(QUESTION) as run:
        texts = [text async for text in run.stream_text(delta=True, debounce_by=None)]
    assert "".join(texts) == whole.output
    follow_up = await agent.run("And of Italy?", message_history=whole.all_messages())
    assert follow_up.output


@pytest.mark.parametrize("kind", [lambda model: model, pydantic_ai.NativeOutput], ids=["tool", "native"])
async def test_a_structured_answer_is_of_its_model(model, kind) -> None:
    agent = pydantic_ai.Agent(model, output_type=kind(City), model_settings=SETTINGS)
    assert isinstance((await agent.run("Describe Paris, the capital of France.")).output, City)


async def test_an_agent_may_call_its_tool_and_gets_on_with_its_result(model) -> None:
    """A model this small does not always stop calling; each call is well-formed, and its result is taken."""
    agent = pydantic_ai.Agent(model, model_settings=SETTINGS, tools=[get_weather])
    with pydantic_ai.capture_run_messages() as messages:
        try:
            await agent.run("What is the weather in Paris?", usage_limits=UsageLimits(request_limit=2))
        except UsageLimitExceeded:
            assert len(messages) == 4
    for message in messages:
        if isinstance(message, ModelResponse):
            for part in message.parts:
                if isinstance(part, ToolCallPart):
                    assert part.tool_name == "get_weather"
                    assert set(part.args_as_dict()) == {"city"}
