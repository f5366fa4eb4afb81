"""Conversations become prompts exactly as transformers renders them, within limits."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from frontend.chat.conversation import Conversation
from frontend.chat.tools import Tool
from frontend.text.chat_template import ChatTemplate
from frontend.text.template_environment import MAX_PROMPT_CHARACTERS
from pagewire.base.errors import ConfigError, InvalidRequest

CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": "Was ist 1+1?\n"},
    {"role": "assistant", "content": "Zwei – 二"},
    {"role": "user", "content": "Danke"},
]
FUNCTION = {"name": "f", "description": "größer <b>", "parameters": {}}
TOOLS = [{"type": "function", "function": FUNCTION}]
SAY_HI = [{"role": "user", "content": "hi"}]

# Exercises what published templates use: whitespace control, loop controls, JSON, generation marks.
RICH_TEMPLATE = """\
{{ bos_token }}{% set ns = namespace(n=0) %}
{% if tools %}
    {% for tool in tools %}
        {{- tool | tojson }}
{{ tool | tojson(indent=2) }}
    {% endfor %}
{% endif %}
{% for message in messages %}
    {% if message.role == "tool" %}{% continue %}{% endif %}
    {% set ns.n = ns.n + 1 %}
    {%- if message['role'] == 'assistant' %}
        {% generation %}{{ message.content | trim }}{{ eos_token }}{% endgeneration %}

    {% else %}
[{{ message.role | upper }} {{ loop.index0 }}] {{ message.content }}
    {% endif %}
    {% if loop.index == 3 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}[ASSISTANT {{ ns.n }}]{% endif %}
"""


def write_template(directory: Path, template: Any, **config: Any) -> Path:
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **config}))
    return directory


def load(directory: Path, template: Any, **config: Any) -> ChatTemplate:
    loaded = ChatTemplate.load(write_template(directory, template, **config), None)
    assert loaded is not None
    return loaded


def render(template: ChatTemplate, messages: list[dict[str, Any]] = SAY_HI, **settings: Any) -> str:
    return template.render(Conversation(messages=messages, **settings))


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("conversation", [CONVERSATION, CONVERSATION[1:2]])
def test_smollm2_prompts_equal_those_of_transformers(
    smollm2_dir: Path, conversation: list[dict[str, Any]], add_generation_prompt: bool
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = ChatTemplate.load(smollm2_dir, None)
    assert template is not None
    source = json.loads((smollm2_dir / "tokenizer_config.json").read_text())["chat_template"]
    [expected], _ = render_jinja_template(
        [conversation], chat_template=source, add_generation_prompt=add_generation_prompt
    )
    assert render(template, conversation, add_generation_prompt=add_generation_prompt) == expected


def test_apply_chat_template_gives_the_same_prompt(smollm2_dir: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    template = ChatTemplate.load(smollm2_dir, None)
    assert template is not None
    expected = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    assert render(template, CONVERSATION) == expected


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_template_of_many_features_renders_as_in_transformers(
    tmp_path: Path, tools: list[dict[str, Any]] | None
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation = [{"role": "tool", "content": "skipped"}, *CONVERSATION[1:]]
    [expected], _ = render_jinja_template(
        [conversation],
        tools=tools,
        chat_template=RICH_TEMPLATE,
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    template = load(tmp_path, RICH_TEMPLATE, bos_token="<s>", eos_token={"content": "</s>"})
    assert render(template, conversation, tools=[Tool(definition=FUNCTION)] if tools else []) == expected


def test_further_variables_reach_the_template(tmp_path: Path) -> None:
    template = load(tmp_path, "{{ enable_thinking }} {{ strftime_now('%Y') }}")
    assert render(template, template_variables={"enable_thinking": False}) == f"False {datetime.now():%Y}"


def test_a_model_without_template_has_none(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path, None) is None
    assert ChatTemplate.load(write_template(tmp_path, None), None) is None


def test_the_override_wins_over_the_file_and_the_file_over_the_configuration(tmp_path: Path) -> None:
    write_template(tmp_path, "configuration {{ bos_token }}", bos_token="<s>")
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}")
    override = tmp_path / "mine.jinja"
    override.write_text("override {{ bos_token }}")
    for path, expected in ((override, "override <s>"), (None, "file <s>")):
        template = ChatTemplate.load(tmp_path, str(path) if path else None)
        assert template is not None
        assert render(template) == expected
    (tmp_path / "chat_template.jinja").unlink()
    template = ChatTemplate.load(tmp_path, None)
    assert template is not None
    assert render(template) == "configuration <s>"


def test_of_named_templates_the_one_for_tools_is_used_with_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    template = load(tmp_path, named)
    assert render(template) == "plain"
    assert render(template, tools=[Tool(definition=FUNCTION)]) == "tools"
    assert render(load(tmp_path, named[:1]), tools=[Tool(definition=FUNCTION)]) == "plain"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "can only concatenate|unsupported operand"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(1000000) %}{% endfor %}", "Range too big"),
    ],
)
def test_what_a_template_refuses_is_the_callers_error(tmp_path: Path, template: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as raised:
        render(load(tmp_path, template), [{"role": "user", "content": None}])
    assert raised.value.param == "messages"


def test_output_is_bounded(tmp_path: Path) -> None:
    template = load(tmp_path, "{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}")
    most = MAX_PROMPT_CHARACTERS // 1000
    assert len(render(template, [{"role": "user", "content": "x" * most}])) == most * 1000
    with pytest.raises(InvalidRequest, match="longer than 16,777,216 characters"):
        render(template, [{"role": "user", "content": "x" * (most + 1)}])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% if %}", r"tokenizer_config\.json: the chat template has an error"),
        (7, "a string or a list of named templates"),
        ([{"name": "default"}], "a string or a list of named templates"),
        ([{"name": "rag", "template": "x"}], "no chat template is named 'default', only rag"),
    ],
)
def test_a_wrong_template_stops_the_start(tmp_path: Path, template: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ChatTemplate.load(write_template(tmp_path, template), None)


def test_a_missing_override_or_broken_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.jinja"):
        ChatTemplate.load(tmp_path, str(tmp_path / "nowhere.jinja"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json is not valid JSON"):
        ChatTemplate.load(tmp_path, None)
