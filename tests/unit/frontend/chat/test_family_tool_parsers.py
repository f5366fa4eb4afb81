"""Replies of further families: calls, thoughts and answers, whole and in pieces, and their constraints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from tokenizers import Tokenizer

from frontend.chat.conversation import Conversation
from frontend.chat.reply import ReplyParser
from frontend.chat.reply_format import Reading, ReplyFormat
from frontend.chat.settings import ChatSettings
from frontend.chat.tool_parsers.glm import ChatGlm3ToolParser, Glm4ToolParser
from frontend.chat.tool_parsers.harmony import HarmonyToolParser
from frontend.chat.tool_parsers.marked_list import (
    CohereToolParser,
    GraniteToolParser,
    Phi4MiniToolParser,
)
from frontend.chat.tool_parsers.protocol import ToolParser
from frontend.chat.tool_parsers.react import ReactToolParser
from frontend.chat.tools import Tool, ToolChoice
from frontend.generation.message_parser import MessagePart
from frontend.text import builtin_templates
from pagewire.base.errors import Unsupported
from pagewire.structured.translate import to_grammar
from pagewire.structured.vocabulary import Vocabulary
from pagewire.wire.sampling_params import SamplingParams, StructuredOutput

NAMES = ("get_weather", "get_time")
PARIS = '{"city": "Paris"}'
WEATHER, TIME = ("get_weather", PARIS), ("get_time", "{}")
ONE = f'{{"name": "get_weather", "arguments": {PARIS}}}'
TWO = '{"name": "get_time", "arguments": {}}'
COHERE_ONE = f'{{"tool_call_id": "0", "tool_name": "get_weather", "parameters": {PARIS}}}'
CODE = "get_weather\n ```python\ntool_call(city='Paris')\n```"
ANALYSIS = "<|channel|>analysis<|message|>Hm, {so}?<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>It rains."
COMMENTARY = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>" + PARIS

STEP = f"Action: get_weather\nAction Input: {PARIS}"

Message = tuple[str, str, list[tuple[str, str]]]
"""Thoughts, content, and name and arguments of each call."""

REPLIES: list[tuple[type[ToolParser], str, Message]] = [
    (GraniteToolParser, f"<|tool_call|>[{ONE}, {TWO}]", ("", "", [WEATHER, TIME])),
    (GraniteToolParser, f"Let me see.\n<tool_call> [{ONE}]", ("", "Let me see.", [WEATHER])),
    (GraniteToolParser, "<|tool_call|>none [x]", ("", "<|tool_call|>none [x]", [])),
    (GraniteToolParser, "Just a <|tool_", ("", "Just a <|tool_", [])),
    (GraniteToolParser, f"<|tool_call|>[{ONE[:-4]}", ("", "", [("get_weather", PARIS[:-3])])),
    (Phi4MiniToolParser, f"<|tool_call|>[{ONE}, {TWO}]<|/tool_call|>", ("", "", [WEATHER, TIME])),
    (Phi4MiniToolParser, f"functools[{ONE}]", ("", "", [WEATHER])),
    (Phi4MiniToolParser, f"<|tool_call|>[{ONE}]\n<|/tool_call|> Done.", ("", " Done.", [WEATHER])),
    (Phi4MiniToolParser, "import functools\nx = [1]", ("", "import functools\nx = [1]", [])),
    (CohereToolParser, f"<|START_ACTION|>[\n    {COHERE_ONE}\n]<|END_ACTION|>", ("", "", [WEATHER])),
    (
        CohereToolParser,
        f'Action: ```json\n[{{"tool_name": "get_weather", "parameters": {PARIS}}}]\n```',
        ("", "", [WEATHER]),
    ),
    (CohereToolParser, "Action: none", ("", "Action: none", [])),
    (ChatGlm3ToolParser, "\n 你好, x", ("", "你好, x", [])),
    (ChatGlm3ToolParser, "", ("", "", [])),
    (ChatGlm3ToolParser, "No line\nat all", ("", "No line\nat all", [])),
    (ChatGlm3ToolParser, CODE, ("", "", [WEATHER])),
    (ChatGlm3ToolParser, "\n Let me see.<|assistant|>" + CODE, ("", "Let me see.", [WEATHER])),
    (ChatGlm3ToolParser, "get_time\n ```python\ntool_call()\n```", ("", "", [TIME])),
    (
        ChatGlm3ToolParser,
        'get_time\n```python\ntool_call(a=[1, {"b": None}], c=True, d="é\\n")\n```<|assistant|>' + CODE,
        ("", "", [("get_time", '{"a": [1, {"b": null}], "c": true, "d": "é\\n"}'), WEATHER]),
    ),
    (ChatGlm3ToolParser, "get_time\n```python\nx = 1\n```", ("", "get_time\n```python\nx = 1\n```", [])),
    (ChatGlm3ToolParser, "get_time\nis a tool", ("", "get_time\nis a tool", [])),
    (
        ChatGlm3ToolParser,
        "unknown\n```python\ntool_call()\n```",
        ("", "unknown\n```python\ntool_call()\n```", []),
    ),
    (Glm4ToolParser, f"get_weather\n{PARIS}", ("", "", [WEATHER])),
    (Glm4ToolParser, "get_weather\n" + PARIS[:9], ("", "", [("get_weather", PARIS[:9])])),
    (Glm4ToolParser, f"get_weather\n{PARIS}\n<|assistant|>get_time\n{{}}", ("", "", [WEATHER, TIME])),
    (Glm4ToolParser, "\nAn answer.", ("", "An answer.", [])),
    (HarmonyToolParser, ANALYSIS + FINAL, ("Hm, {so}?", "It rains.", [])),
    (HarmonyToolParser, ANALYSIS + FINAL + "<|return|>", ("Hm, {so}?", "It rains.", [])),
    (HarmonyToolParser, ANALYSIS + "<|start|>assistant" + COMMENTARY, ("Hm, {so}?", "", [WEATHER])),
    (HarmonyToolParser, COMMENTARY + "<|call|>", ("", "", [WEATHER])),
    (
        HarmonyToolParser,
        " to=functions.get_time<|channel|>commentary json<|message|><|call|>",
        ("", "", [TIME]),
    ),
    (
        HarmonyToolParser,
        "<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant" + COMMENTARY,
        ("", "Wait.", [WEATHER]),
    ),
    (HarmonyToolParser, "<|channel|>analysis<|message|>Cut o", ("Cut o", "", [])),
    (HarmonyToolParser, '{"plain": 1}', ("", '{"plain": 1}', [])),
    (ReactToolParser, f"Thought: Hm.\n{STEP}", ("", "Hm.", [WEATHER])),
    (ReactToolParser, f" I look.\n{STEP}\nObservation: 3\nThought: x", ("", "I look.", [WEATHER])),
    (ReactToolParser, STEP, ("", "", [WEATHER])),
    (ReactToolParser, STEP[:-3], ("", "", [("get_weather", PARIS[:-3])])),
    (ReactToolParser, "Thought: Now I know.\nFinal Answer: It\nrains.", ("Now I know.", "It\nrains.", [])),
    (ReactToolParser, "Hello!\nAction films are fun.", ("", "Hello!\nAction films are fun.", [])),
    (ReactToolParser, "x\nAction: none\nFinal Answer: y", ("x\nAction: none", "y", [])),
    (ReactToolParser, "x\nAction: get_time\nAction", ("", "x\nAction: get_time\nAction", [])),
    (
        ReactToolParser,
        f"x\nAction: get_time\nAction Input: now\n{STEP}",
        ("", "x\nAction: get_time\nAction Input: now", [WEATHER]),
    ),
]


def read(reply: ReplyParser, pieces: list[str]) -> Message:
    thoughts, content = "", ""
    calls: list[list[str]] = []
    parts: list[MessagePart] = [reply.push(piece, last=False) for piece in pieces]
    for part in [*parts, reply.push("", last=True)]:
        thoughts += part.reasoning
        content += part.content
        for delta in part.tool_calls:
            if delta.index == len(calls):
                assert delta.id
                calls.append([delta.name, ""])
            calls[delta.index][1] += delta.arguments
    return thoughts, content, [(name, arguments) for name, arguments in calls]


@pytest.mark.parametrize(("parser", "reply", "expected"), REPLIES, ids=lambda each: str(each)[-20:])
def test_replies_are_read_however_they_are_cut(
    parser: type[ToolParser], reply: str, expected: Message
) -> None:
    def parsed(pieces: list[str]) -> Message:
        return read(ReplyParser(reasoning=None, tools=parser(NAMES)), pieces)

    assert parsed([reply]) == expected
    assert parsed(list(reply)) == expected
    for cut in range(len(reply)):
        assert parsed([reply[:cut], reply[cut:]]) == expected


PARSERS = [GraniteToolParser, Phi4MiniToolParser, CohereToolParser]
FRAMED = [ChatGlm3ToolParser, Glm4ToolParser, HarmonyToolParser, ReactToolParser]
PIECES = [
    *("<|tool_call|>", "<|/tool_call|>", "functools", "<|START_ACTION|>", "Action: ```json", "```", "[", "]"),
    *(
        "{",
        "}",
        '"name"',
        '"get_time"',
        ":",
        ",",
        '"arguments"',
        "get_time",
        "\n",
        " ",
        "tool_call(a=1)",
        "é",
    ),
    *("<|assistant|>", "```python\n", "<|channel|>", "analysis", "<|message|>", "<|end|>", "<|start|>", "x"),
    *(" to=functions.get_time", "<|call|>", "final"),
    *("Thought:", "\nAction:", "Action Input: {", "Final Answer:"),
]


@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=12), cut=st.integers(0, 40))
def test_any_reply_is_read_the_same_in_pieces_and_text_without_calls_stays_whole(
    pieces: list[str], cut: int
) -> None:
    reply = "".join(pieces)
    for parser in (*PARSERS, *FRAMED):
        whole = read(ReplyParser(reasoning=None, tools=parser(NAMES)), [reply])
        assert read(ReplyParser(reasoning=None, tools=parser(NAMES)), list(reply)) == whole
        assert read(ReplyParser(reasoning=None, tools=parser(NAMES)), [reply[:cut], reply[cut:]]) == whole
        if parser in PARSERS and not whole[2]:
            assert whole[1] == reply


def test_thoughts_can_be_left_out() -> None:
    reply = ReplyParser(reasoning=None, tools=HarmonyToolParser(()), include_reasoning=False)
    assert read(reply, [ANALYSIS + FINAL]) == ("", "It rains.", [])


TEMPLATE_FOLDER = Path(builtin_templates.__file__).parent / "templates"
TEMPLATES = [
    ("<|start_of_role|>{{ x }} write <|tool_call|>", "granite", None),
    ("<|system|><|tool|>{{ tools }}<|/tool|>", "phi4_mini", None),
    ("<|START_THINKING|><|END_THINKING|><|START_ACTION|>", "cohere", "<|END_THINKING|>"),
    ("<|CHATBOT_TOKEN|> Write 'Action:' followed by", "cohere", None),
    ("[gMASK]sop<|user|>", "chatglm3", None),
    ("[gMASK]<sop><|observation|>", "glm4", None),
    ("<|start|>assistant<|channel|>final<|message|>", "harmony", None),
    ((TEMPLATE_FOLDER / "qwen1.jinja").read_text(), "react", None),
]


@pytest.mark.parametrize(("template", "tools", "closing"), TEMPLATES)
def test_the_template_shows_the_format(template: str, tools: str, closing: str | None) -> None:
    form = ReplyFormat.choose(template, {}, ChatSettings())
    assert form.tools is not None
    assert form.tools.name == tools
    assert (form.reasoning.closing if form.reasoning else None) == closing


Accepts = Callable[[StructuredOutput | None, str], bool]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
STRICT = Tool(definition={"name": "get_weather", "parameters": CITY}, strict=True)
LOOSE = Tool(definition={"name": "get_time"})
SCHEMA = StructuredOutput(
    json_schema=json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}})
)


@pytest.fixture(scope="module")
def accepts(smollm2_dir: Path) -> Accepts:
    """Whether a text, tokenized as a model writes it, satisfies a constraint as a whole."""
    vocabulary = Vocabulary.load(smollm2_dir, 49152, (2,))
    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))

    def check(structured: StructuredOutput | None, text: str) -> bool:
        assert structured is not None
        matcher = LLMatcher(vocabulary.tokenizer, to_grammar(structured), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        valid = matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids)
        return bool(valid and matcher.is_accepting())

    return check


def held(
    parser: type[ToolParser], answer: StructuredOutput | None = None, choice: ToolChoice | None = None
) -> Reading:
    conversation = Conversation(
        messages=[{"role": "user", "content": "x"}],
        tools=() if choice is None else (STRICT, LOOSE),
        tool_choice=choice or ToolChoice(),
    )
    return ReplyFormat(tools=parser).read(conversation, "", SamplingParams(structured_output=answer))


@pytest.mark.parametrize(
    ("parser", "write", "text"),
    [
        (GraniteToolParser, '<|tool_call|>[{{"name": "get_weather", "arguments": {}}}]', "A text."),
        (
            Phi4MiniToolParser,
            '<|tool_call|>[{{"name": "get_weather", "arguments": {}}}]<|/tool_call|>',
            "A text.",
        ),
        (
            CohereToolParser,
            '<|START_ACTION|>[{{"tool_call_id": "0", "tool_name": "get_weather", "parameters": {}}}]'
            "<|END_ACTION|>",
            "A text.",
        ),
        (Glm4ToolParser, "get_weather\n{}", "\nA text."),
        (
            ReactToolParser,
            "Action: get_weather\nAction Input: {}",
            "Thought: I know.\nFinal Answer: A text.",
        ),
        (
            HarmonyToolParser,
            "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant"
            "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{}",
            "<|channel|>final<|message|>A text.",
        ),
    ],
)
def test_strict_tools_are_enforced_in_the_families_own_formats(
    accepts: Accepts, parser: type[ToolParser], write: str, text: str
) -> None:
    constraint = held(parser, choice=ToolChoice()).sampling.structured_output
    assert accepts(constraint, text)
    assert accepts(constraint, write.format('{"city": "Rome"}'))
    assert not accepts(constraint, write.format('{"city": "Bonn"}'))
    both = held(parser, SCHEMA, ToolChoice()).sampling.structured_output
    assert accepts(both, write.format('{"city": "Rome"}'))
    assert not accepts(both, text)


def test_harmonys_constrained_answers_and_forced_calls_are_on_the_final_channel(accepts: Accepts) -> None:
    final = "<|channel|>final<|message|>"
    frames = ("", "<|channel|>analysis<|message|>Hm {<|end|><|start|>assistant")
    answer = held(HarmonyToolParser, SCHEMA)
    forced = held(HarmonyToolParser, choice=ToolChoice(kind="named", name="get_weather"))
    for frame in frames:
        assert accepts(answer.sampling.structured_output, frame + final + '{"a": 1}')
        assert not accepts(answer.sampling.structured_output, frame + final + "It rains.")
        assert accepts(forced.sampling.structured_output, frame + final + PARIS)
    assert answer.new_parser is not None
    part = answer.new_parser().push(frames[1] + final + '{"a": 1}', last=True)
    assert (part.reasoning, part.content) == ("Hm {", '{"a": 1}')
    assert forced.new_parser is not None
    (call,) = forced.new_parser().push(frames[1] + final + PARIS, last=True).tool_calls
    assert (call.name, call.arguments) == WEATHER


def test_chatglm3s_answers_lose_their_first_line_even_without_tools_and_its_calls_cannot_be_held() -> None:
    plain = held(ChatGlm3ToolParser)
    assert plain.new_parser is not None
    assert plain.new_parser().push("\n 你好", last=True).content == "你好"
    with pytest.raises(Unsupported, match="chatglm3"):
        held(ChatGlm3ToolParser, choice=ToolChoice())


def test_a_reply_that_may_call_ends_before_it_makes_up_a_result(accepts: Accepts) -> None:
    assert held(ReactToolParser).sampling.stop == ()
    may_call = held(ReactToolParser, choice=ToolChoice()).sampling
    assert may_call.stop == ("Observation:",)
    assert accepts(may_call.structured_output, f"Thought: Hm.\n{STEP}")
    assert not accepts(may_call.structured_output, f"Thought: Hm.\n{STEP.replace('Paris', 'Bonn')}")
    forced = held(ReactToolParser, choice=ToolChoice(kind="required")).sampling
    assert forced.stop == ()
