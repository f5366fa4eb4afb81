"""What becomes of messages: the prompt that the model reads, and whose turn it answers in."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.conformance.target import Target

USER = {"role": "user", "content": "Name the capital of France."}


def test_a_question_is_answered(target: Target) -> None:
    completion = target.chat(messages=[USER], temperature=0, max_tokens=16)
    [choice] = completion.choices
    assert choice.message.role == "assistant"
    assert "Paris" in choice.message.content
    usage = completion.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.extension
def test_roles_reach_the_prompt(target: Target) -> None:
    system, developer, user = (
        target.rendered(messages=[{"role": role, "content": "Be terse."}, USER])
        for role in ("system", "developer", "user")
    )
    assert "Be terse." in system
    assert "Be terse." in developer
    assert system != user
    assert USER["content"] in system


@pytest.mark.extension
def test_a_chat_is_a_completion_of_the_rendered_prompt(target: Target) -> None:
    ids = target.tokenize(messages=[USER])
    text = target.choice(prompt=ids, max_tokens=8).text
    assert target.reply(messages=[USER], max_tokens=8).message.content == text
    assert target.chat(messages=[USER], max_tokens=1).usage.prompt_tokens == len(ids)


@pytest.mark.extension
def test_parts_are_one_text(target: Target) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": USER["content"]}]}
    assert target.rendered(messages=[parts]) == target.rendered(messages=[USER])


def test_pictures_are_refused_by_name(target: Target) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(openai.BadRequestError):
        target.chat(messages=[{"role": "user", "content": [part]}], max_tokens=1)


@pytest.mark.extension
def test_the_assistants_turn_is_opened_or_not(target: Target) -> None:
    opened = target.rendered(messages=[USER])
    closed = target.rendered(messages=[USER], add_generation_prompt=False)
    assert opened.startswith(closed)
    assert "assistant" in opened.removeprefix(closed)
    asked: dict[str, Any] = {"messages": [USER], "max_tokens": 1}
    longer, shorter = (
        target.chat(**asked, add_generation_prompt=each).usage.prompt_tokens for each in (True, False)
    )
    assert longer > shorter


@pytest.mark.extension
def test_the_last_turn_is_continued(target: Target) -> None:
    begun = {"role": "assistant", "content": "The capital of France is"}
    rendered = target.rendered(
        messages=[USER, begun], continue_final_message=True, add_generation_prompt=False
    )
    assert rendered.endswith("The capital of France is")
    reply = target.reply(
        messages=[USER, begun], max_tokens=4, continue_final_message=True, add_generation_prompt=False
    )
    assert reply.message.content.startswith(" Paris")


@pytest.mark.extension
def test_template_variables_reach_the_template(target: Target, model_directory: Any) -> None:
    """add_generation_prompt is a variable like any other to this model's template, which has no others."""
    variables = {"unused_by_this_template": 1}
    assert target.rendered(messages=[USER], chat_template_kwargs=variables) == target.rendered(
        messages=[USER]
    )
    with pytest.raises(openai.BadRequestError, match="messages"):
        target.chat(messages=[USER], max_tokens=1, chat_template_kwargs={"messages": []})


@pytest.mark.extension
def test_a_requests_own_template_needs_the_operators_trust(target: Target, model_directory: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="--trust-request-chat-template"):
        target.chat(messages=[USER], max_tokens=1, chat_template="{{ messages }}")
