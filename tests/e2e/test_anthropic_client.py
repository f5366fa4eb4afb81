"""The official anthropic client against a real service."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tools.service import Service

if TYPE_CHECKING:
    import anthropic

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "anthropic.md"
QUESTION = {"role": "user", "content": "Name the capital of France. Answer in one word."}
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def client(server: Service) -> Iterator[anthropic.Anthropic]:
    import anthropic  # takes seconds, and every process that runs tests collects this file

    with anthropic.Anthropic(base_url=server.http_url, api_key="unused", max_retries=0) as client:
        yield client


def test_a_conversation_goes_on_with_its_own_answers(client: anthropic.Anthropic, server: Service) -> None:
    asked = {"model": server.model, "max_tokens": 12, "extra_body": GREEDY}
    first = client.messages.create(**asked, messages=[QUESTION])
    assert "Paris" in first.content[0].text
    counted = client.messages.count_tokens(model=server.model, messages=[QUESTION])
    usage = first.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    history = [QUESTION, first.to_param(), {"role": "user", "content": "And of Italy?"}]
    with client.messages.stream(**asked, messages=history) as stream:
        pieces = list(stream.text_stream)
        second = stream.get_final_message()
    assert "".join(pieces) == second.content[0].text
    assert second.stop_reason in ("end_turn", "max_tokens")
    assert second.usage.output_tokens >= len(pieces)


def test_a_tool_can_be_forced(client: anthropic.Anthropic, server: Service) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    message = client.messages.create(
        model=server.model,
        max_tokens=40,
        messages=[QUESTION],
        tools=[{"name": "look_up", "description": "Finds a city", "input_schema": schema}],
        tool_choice={"type": "tool", "name": "look_up"},
        extra_body=GREEDY,
    )
    [call] = message.content
    assert (message.stop_reason, call.type, call.name) == ("tool_use", "tool_use", "look_up")
    assert call.input["city"] in ("Paris", "Rome")


def test_the_documents_example_works(server: Service, capsys: pytest.CaptureFixture[str]) -> None:
    [block] = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    exec(block.replace("http://localhost:8000", server.http_url), {})
    assert "Paris" in capsys.readouterr().out
