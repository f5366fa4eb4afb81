"""Templates of the families that people serve render as in transformers, tools and thoughts included.

The templates in templates/ are written after the formats that the families document.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest

from frontend.chat.conversation import Conversation
from frontend.chat.tools import Tool, ToolChoice
from frontend.text import template_renderer
from frontend.text.chat_template import ChatTemplate
from frontend.text.template_traits import TemplateTraits
from pagewire.base.errors import InvalidRequest, Unsupported

TEMPLATES = Path(__file__).parent / "templates"
FAMILIES = ("llama31", "qwen25", "qwen3", "mistral", "hermes_tool_use", "smollm2")
WITH_CALLS = FAMILIES[:-1]
WEATHER = {
    "name": "get_weather",
    "description": "The weather – now",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
SYSTEM = {"role": "system", "content": "Be brief & <kind>."}
USER = {"role": "user", "content": "Wie ist das Wetter in Zürich?\n"}
CALLS = {
    "role": "assistant",
    "tool_calls": [
        {
            "id": "abcdefgh1",
            "type": "function",
            "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "abcdefgh1", "name": "get_weather", "content": '{"sun": true}'}
ANSWER = {"role": "assistant", "content": " Sonnig. "}


@pytest.fixture
def source(request: pytest.FixtureRequest, smollm2_dir: Path) -> str:
    if request.param == "smollm2":
        return str(json.loads((smollm2_dir / "tokenizer_config.json").read_text())["chat_template"])
    return (TEMPLATES / f"{request.param}.jinja").read_text()


def ours(tmp_path: Path, source: str, messages: list[dict[str, Any]], **settings: Any) -> str:
    config = {"chat_template": source, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.load(tmp_path, None, trust_requests=True)
    assert template is not None
    before = copy.deepcopy(messages)
    rendered = template.render(Conversation(messages=messages, **settings))
    assert messages == before  # the caller's
    return rendered


def theirs(source: str, messages: list[dict[str, Any]], **settings: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    [rendered], _ = render_jinja_template(
        [messages],
        chat_template=source,
        bos_token="<s>",
        eos_token="</s>",
        **{"add_generation_prompt": True, **settings},
    )
    return rendered


@pytest.mark.parametrize("source", FAMILIES, indirect=True)
@pytest.mark.parametrize("messages", [[USER], [SYSTEM, USER], [SYSTEM, USER, ANSWER, USER]])
def test_plain_conversations(tmp_path: Path, source: str, messages: list[dict[str, Any]]) -> None:
    if source == (TEMPLATES / "hermes_tool_use.jinja").read_text():
        pytest.skip("its template is for tools only")
    assert ours(tmp_path, source, messages) == theirs(source, messages)


@pytest.mark.parametrize("source", WITH_CALLS, indirect=True)
@pytest.mark.parametrize(
    "messages", [[USER], [USER, CALLS, RESULT], [SYSTEM, USER, CALLS, RESULT, ANSWER, USER]]
)
def test_tools_and_their_calls(tmp_path: Path, source: str, messages: list[dict[str, Any]]) -> None:
    tools = [Tool(definition=WEATHER, strict=True), Tool(definition={**WEATHER, "name": "other"})]
    definitions = [{"type": "function", "function": tool.definition} for tool in tools]
    expected = theirs(source, messages, tools=definitions)
    assert "get_weather" in expected
    null_content = [{**message, "content": message.get("content")} for message in messages]
    assert ours(tmp_path, source, null_content, tools=tools) == expected
    without = [message for message in messages if message in (USER, SYSTEM, ANSWER)]
    if source != (TEMPLATES / "hermes_tool_use.jinja").read_text():
        unasked = ours(tmp_path, source, without, tools=tools, tool_choice=ToolChoice(kind="none"))
        assert unasked == theirs(source, without)


@pytest.mark.parametrize("source", FAMILIES, indirect=True)
@pytest.mark.parametrize("content", ["It is", " It is ", "It is\n\n", "<think>\na\n</think>\n\nIt"])
def test_the_last_turn_is_continued(tmp_path: Path, source: str, content: str) -> None:
    messages = [USER, {"role": "assistant", "content": content}]
    settings: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    expected = theirs(source, messages, tools=[{"type": "function", "function": WEATHER}], **settings)
    rendered = ours(tmp_path, source, messages, tools=[Tool(definition=WEATHER)], **settings)
    assert rendered == expected
    assert not rendered.endswith((">", "\n>"))


@pytest.mark.parametrize("enable_thinking", [True, False, None])
@pytest.mark.parametrize("source", ["qwen3"], indirect=True)
def test_thoughts_of_earlier_turns_and_variables_reach_the_template(
    tmp_path: Path, source: str, enable_thinking: bool | None
) -> None:
    variables = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    messages = [USER, {**CALLS, "reasoning_content": "I should look."}, RESULT]
    rendered = ours(tmp_path, source, messages, template_variables=variables)
    assert rendered == theirs(source, messages, **variables)
    assert "<think>\nI should look.\n</think>" in rendered
    assert rendered.endswith("</think>\n\n") is (enable_thinking is False)


@pytest.mark.parametrize("source", ["parts", "qwen25", "smollm2"], indirect=True)
def test_parts_reach_templates_that_go_through_them_and_text_the_others(tmp_path: Path, source: str) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    takes_parts = "for line in" in source
    assert TemplateTraits.read(source).takes_parts is takes_parts
    expected = parts if takes_parts else "one\ntwo"
    rendered = ours(tmp_path, source, [{"role": "user", "content": parts}])
    assert rendered == theirs(source, [{"role": "user", "content": expected}])
    as_parts = [{"type": "text", "text": "hi"}] if takes_parts else "hi"
    rendered = ours(tmp_path, source, [{"role": "user", "content": "hi"}])
    assert rendered == theirs(source, [{"role": "user", "content": as_parts}])


@pytest.mark.parametrize(
    ("source", "takes_parts", "takes_text"),
    [
        ("{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}", True, False),
        ("{% set c = messages[0]['content'] %}{% for x in c | list %}{{ x }}{% endfor %}", True, False),
        (
            "{% if m['content'] is string %}{% else %}{% for c in m['content'][1:] %}{% endfor %}{% endif %}",
            True,
            True,
        ),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False, True),
        ("{% for line in m.content.split('x') %}{% endfor %}", False, True),
    ],
)
def test_the_form_of_contents_is_read_from_the_template(
    source: str, takes_parts: bool, takes_text: bool
) -> None:
    traits = TemplateTraits.read(source)
    assert (traits.takes_parts, traits.takes_text) == (takes_parts, takes_text)


def test_a_developer_speaks_as_the_system_where_the_template_knows_none(tmp_path: Path) -> None:
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
    messages = [{"role": "developer", "content": "a"}]
    assert ours(tmp_path, plain, messages) == "system: a;"
    assert ours(tmp_path, plain + "{# developer #}", messages) == "developer: a;"


def test_arguments_are_text_where_the_template_joins_them_to_text(tmp_path: Path) -> None:
    source = "{% for m in messages %}{{ '>' + m['tool_calls'][0]['function']['arguments'] }}{% endfor %}"
    assert ours(tmp_path, source, [CALLS]) == '>{"city": "Zürich", "days": 2}'


PLAIN = "{% for m in messages %}[{{ m.role }}: {{ m.content + '' }}]{% endfor %}"


def test_calls_and_results_are_text_where_the_template_knows_only_text(tmp_path: Path) -> None:
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}\n</tool_call>'
    results = [
        {"role": "tool", "content": "warm"},
        {"role": "tool", "content": [{"type": "text", "text": "wet"}]},
    ]
    told = "<tool_response>\nwarm\n</tool_response>\n<tool_response>\nwet\n</tool_response>"
    history = [USER, CALLS, *results, ANSWER]
    asked = ours(tmp_path, PLAIN, [USER]) + f"[assistant: {call}]"
    assert ours(tmp_path, PLAIN, history) == asked + f"[user: {told}]" + ours(tmp_path, PLAIN, [ANSWER])
    assert ours(tmp_path, PLAIN, [*history[:-1], USER]) == asked + f"[user: {told}\n{USER['content']}]"
    knows_results = PLAIN + "{% if messages[0].role == 'tool' %}{% endif %}"
    assert ours(tmp_path, knows_results, history[:3]) == asked + "[tool: warm]"
    cut_off = {**CALLS, "tool_calls": [{"function": {"name": "f", "arguments": '{"a'}}], "content": "So:"}
    assert ours(tmp_path, PLAIN, [cut_off]).endswith(
        'So:\n\n<tool_call>\n{"name": "f", "arguments": {"a}\n</tool_call>]'
    )


def test_documents_reach_the_template(tmp_path: Path) -> None:
    source = "{% for d in documents %}{{ d.title }}{% endfor %}"
    assert ours(tmp_path, source, [USER], documents=[{"title": "A", "text": "b"}]) == "A"


def test_a_turn_without_text_cannot_be_continued(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    with pytest.raises(InvalidRequest, match="no content to continue"):
        ours(tmp_path, "{{ messages[-1].content }}", [USER, CALLS], **settings)
    with pytest.raises(InvalidRequest, match="does not show the end"):
        ours(tmp_path, "{{ messages[0].content }}", [USER, ANSWER], **settings)
    with pytest.raises(InvalidRequest, match="set one of them"):
        ours(tmp_path, "{{ messages[0].content }}", [USER], continue_final_message=True)


def test_variables_may_not_be_the_requests_own_fields(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="'tools', which is a field") as raised:
        ours(tmp_path, "x", [USER], template_variables={"tools": []})
    assert raised.value.param == "chat_template_kwargs"


def test_a_requests_own_template_is_used_where_the_server_trusts_it(tmp_path: Path) -> None:
    given = "{{ bos_token }}{{ messages[0].content }}{{ tone }}{% if add_generation_prompt %}>{% endif %}"
    rendered = ours(tmp_path, "x", [USER], chat_template=given, template_variables={"tone": "!"})
    assert rendered == "<s>" + USER["content"] + "!>"
    refusing = ChatTemplate.load(tmp_path, None)
    assert refusing is not None
    with pytest.raises(Unsupported, match="--trust-request-chat-template") as raised:
        refusing.render(Conversation(messages=[USER], chat_template=given))
    assert raised.value.param == "chat_template"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "2 s of processor time",
        ),
        ("{{ 'a' * 10**10 }}", "MiB of memory"),
        (
            "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
            "memory",
        ),
        ("{% for a in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "longer than 16,777,216"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% if %}", "has an error"),
        ("{{ raise_exception('no') }}", "failed: no"),
        ("{{ 'x' * 200000 }}" + " " * 200_000, "at most 131072"),
        ("{{" + "(" * 50_000, "has an error"),
    ],
)
def test_a_hostile_template_of_a_request_harms_nothing(tmp_path: Path, given: str, said: str) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidRequest, match=said) as raised:
        ours(tmp_path, "x", [USER], chat_template=given)
    assert raised.value.param == "chat_template"
    assert time.monotonic() - began < template_renderer._WALL_SECONDS


def test_inline_templates_and_files_replace_the_models_own(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("from a file")
    (tmp_path / "chat_template.jinja").write_text("plain")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    tool = Tool(definition=WEATHER)
    for override, plain, with_tools in (
        ("{# #}inline", "inline", "inline"),
        (str(tmp_path / "mine.jinja"), "from a file", "from a file"),
        (None, "plain", "tools"),
    ):
        template = ChatTemplate.load(tmp_path, override)
        assert template is not None
        assert template.render(Conversation(messages=[USER])) == plain
        assert template.render(Conversation(messages=[USER], tools=[tool])) == with_tools
    assert template.render(Conversation(messages=[USER], chat_template="tool_use")) == "tools"
