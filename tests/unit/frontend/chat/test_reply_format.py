"""Tools and thoughts become constraints that hold a model to its format, and nothing but its format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer

from frontend.chat.conversation import Conversation
from frontend.chat.reasoning import ReasoningFormat
from frontend.chat.reply_format import Reading, ReplyFormat
from frontend.chat.settings import ChatSettings
from frontend.chat.tool_parsers.generic import GenericToolParser
from frontend.chat.tool_parsers.hermes import HermesToolParser
from frontend.chat.tool_parsers.llama3_json import Llama3JsonToolParser
from frontend.chat.tool_parsers.mistral import MistralToolParser
from frontend.chat.tool_parsers.protocol import ToolParser
from frontend.chat.tool_parsers.pythonic import PythonicToolParser
from frontend.chat.tools import Tool, ToolChoice
from pagewire.base.errors import ConfigError, InvalidRequest, Unsupported
from pagewire.structured.translate import to_grammar
from pagewire.structured.vocabulary import Vocabulary
from pagewire.wire.sampling_params import SamplingParams, StructuredOutput

Accepts = Callable[[StructuredOutput | None, str], bool]

TREE = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "children": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["name"],
    "additionalProperties": False,
}
CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/c"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"c": {"enum": ["Paris", "Rome"]}},
}
WEATHER = Tool(definition={"name": "get_weather", "parameters": CITY}, strict=True)
PLANT = Tool(definition={"name": "plant", "parameters": TREE})
NOW = Tool(definition={"name": "now"}, strict=True)
TOOLS = (WEATHER, PLANT, NOW)
THINK = ReasoningFormat()
SCHEMA = StructuredOutput(
    json_schema=json.dumps(
        {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
    )
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
        return (
            matcher.validate_tokens(ids) == len(ids)
            and matcher.consume_tokens(ids)
            and matcher.is_accepting()
        )

    return check


def read(
    form: ReplyFormat, prompt_end: str = "", answer: StructuredOutput | None = None, **settings: Any
) -> Reading:
    conversation = Conversation(messages=[{"role": "user", "content": "x"}], **settings)
    return form.read(conversation, prompt_end, SamplingParams(structured_output=answer))


def test_a_named_call_is_the_functions_arguments(accepts: Accepts) -> None:
    named = read(ReplyFormat(), tools=TOOLS, tool_choice=ToolChoice(kind="named", name="get_weather"))
    constraint = named.sampling.structured_output
    assert accepts(constraint, '{"city": "Rome"}')
    assert not accepts(constraint, '{"city": "Bonn"}')
    assert named.new_parser is not None
    (call,) = named.new_parser().push('{"city": "Rome"}', last=True).tool_calls
    assert (call.name, call.arguments) == ("get_weather", '{"city": "Rome"}')
    without = read(ReplyFormat(), tools=TOOLS, tool_choice=ToolChoice(kind="named", name="now"))
    assert accepts(without.sampling.structured_output, "{}")
    assert not accepts(without.sampling.structured_output, '{"x": 1}')


def test_required_calls_are_a_list_and_references_in_schemas_hold(accepts: Accepts) -> None:
    required = read(ReplyFormat(), tools=TOOLS, tool_choice=ToolChoice(kind="required"))
    one = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
    tree = '{"name": "plant", "parameters": {"name": "a", "children": [{"name": "b"}]}}'
    constraint = required.sampling.structured_output
    assert accepts(constraint, f"[{one}]")
    assert accepts(constraint, f"[{one}, {tree}]")
    assert not accepts(constraint, "[]")
    assert not accepts(constraint, f"[{one.replace('Paris', 'Bonn')}]")
    assert not accepts(constraint, f"[{tree.replace('[{', '[1, {')}]")
    assert not accepts(constraint, '[{"name": "plant", "parameters": {"city": "Paris"}}]')
    single = read(
        ReplyFormat(), tools=TOOLS, tool_choice=ToolChoice(kind="required"), parallel_tool_calls=False
    )
    assert accepts(single.sampling.structured_output, f"[{tree}]")
    assert not accepts(single.sampling.structured_output, f"[{tree}, {one}]")
    assert required.new_parser is not None
    calls = required.new_parser().push(f"[{one}, {tree}]", last=True).tool_calls
    assert [call.name for call in calls] == ["get_weather", "plant"]


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def llama(name: str, arguments: str) -> str:
    return f'{{"name": "{name}", "parameters": {arguments}}}'


def mistral_list(name: str, arguments: str) -> str:
    return f'[TOOL_CALLS] [{{"name": "{name}", "arguments": {arguments}}}]'


def mistral(name: str, arguments: str) -> str:
    return f"[TOOL_CALLS]{name}[ARGS]{arguments}"


@pytest.mark.parametrize(
    ("parser", "write"),
    [
        (HermesToolParser, hermes),
        (Llama3JsonToolParser, llama),
        (MistralToolParser, mistral),
        (MistralToolParser, mistral_list),
    ],
)
def test_strict_tools_are_enforced_in_the_models_own_format(
    accepts: Accepts, parser: type[ToolParser], write: Callable[[str, str], str]
) -> None:
    form = ReplyFormat(tools=parser)
    strict = read(form, tools=TOOLS).sampling.structured_output
    assert accepts(strict, "Just a text, {with} [braces].")
    assert accepts(strict, write("get_weather", '{"city": "Paris"}'))
    assert accepts(strict, write("plant", '{"anything": [1]}'))  # that one is not strict
    assert accepts(strict, write("now", "{}"))
    assert not accepts(strict, write("get_weather", '{"city": "Bonn"}'))
    assert not accepts(strict, write("now", '{"x": 1}'))
    assert not accepts(strict, write("unknown", "{}"))
    assert read(form, tools=(PLANT,)).sampling.structured_output is None
    both = read(form, answer=SCHEMA, tools=TOOLS).sampling.structured_output
    assert accepts(both, '{"a": 1}')
    assert not accepts(both, "Just a text")
    assert accepts(both, write("now", "{}"))
    assert not accepts(both, write("now", '{"x": 1}'))


def test_text_before_calls_and_several_calls(accepts: Accepts) -> None:
    several = hermes("now", "{}") + "\n" + hermes("now", "{}")
    strict = read(ReplyFormat(tools=HermesToolParser), tools=TOOLS).sampling.structured_output
    assert accepts(strict, "Let me see.\n\n" + several)
    assert not accepts(strict, "Let me see.\n\n" + hermes("now", "{}") + "\nSo it is.")  # would need a call
    single = read(ReplyFormat(tools=HermesToolParser), tools=TOOLS, parallel_tool_calls=False)
    assert not accepts(single.sampling.structured_output, several)


def test_generic_calls_are_held_to_names_and_objects_and_to_schemas_where_tools_are_strict(
    accepts: Accepts,
) -> None:
    form = ReplyFormat(tools=GenericToolParser)
    loose = read(form, tools=(PLANT, Tool(definition={"name": "x", "parameters": {"not": {}}})))
    held = loose.sampling.structured_output
    assert accepts(held, "Just a text, <b> with <tool_ in it.")
    assert accepts(held, "So:\n" + hermes("plant", '{"anything": [1]}'))
    assert accepts(held, hermes("x", "{}") + "\n" + hermes("plant", "{}"))
    assert not accepts(held, hermes("unknown", "{}"))
    assert not accepts(held, hermes("plant", "[1]"))
    assert not accepts(held, "<tool_call> is how I call.")
    strict = read(form, tools=TOOLS).sampling.structured_output
    assert accepts(strict, hermes("plant", '{"anything": [1]}'))
    assert not accepts(strict, hermes("get_weather", '{"city": "Bonn"}'))
    many = [Tool(definition={"name": f"{number:064}"}) for number in range(1024)]
    assert accepts(read(form, tools=many).sampling.structured_output, hermes(f"{1023:064}", "{}"))


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (SCHEMA, '{"a": 1}', '{"a": "x"}'),
        (StructuredOutput(json_object=True), '{"b": [true]}', "[]"),
        (StructuredOutput(choices=('"yes"/no', "\\no")), '"yes"/no', "yes"),
        (StructuredOutput(regex=r"a/\/[/\d]+|é"), "a//1/2", "a/1"),
    ],
)
def test_thoughts_are_free_and_the_answer_is_not(
    accepts: Accepts, answer: StructuredOutput, right: str, wrong: str
) -> None:
    form = ReplyFormat(reasoning=THINK)
    thought = "Hm, {is it}\n</think>\n\n"
    ahead = read(form, "assistant\n", answer).sampling.structured_output
    assert accepts(ahead, right)
    assert accepts(ahead, "<think>\n" + thought + right)
    assert not accepts(ahead, "<think>\n" + thought + wrong)
    assert not accepts(ahead, wrong)
    begun = read(form, "assistant\n<think>\n", answer).sampling.structured_output
    assert accepts(begun, thought + right)
    assert not accepts(begun, thought + wrong)
    assert not accepts(begun, right)
    over = read(form, "assistant\n<think>\n\n</think>\n\n", answer).sampling.structured_output
    assert over == answer


def test_marks_that_are_special_tokens_are_known_by_their_ids(accepts: Accepts) -> None:
    form = ReplyFormat(
        reasoning=ReasoningFormat("<|im_start|>", "<|endoftext|>"),
        tools=HermesToolParser,
        special_ids={"<|im_start|>": 1, "<|endoftext|>": 0},
    )
    reading = read(form, "", SCHEMA)
    assert accepts(reading.sampling.structured_output, '<|im_start|>hm<|endoftext|>\n{"a": 1}')
    assert not accepts(reading.sampling.structured_output, '<|im_start|>hm{"a": 1}')
    assert form.marks[:2] == ("<|im_start|>", "<|endoftext|>")


def test_forced_calls_and_strict_tools_come_behind_thoughts(accepts: Accepts) -> None:
    form = ReplyFormat(HermesToolParser, THINK)
    for choice, reply in (
        (ToolChoice(kind="named", name="now"), "{}"),
        (ToolChoice(kind="required"), '[{"name": "now", "parameters": {}}]'),
        (ToolChoice(), hermes("now", "{}")),
    ):
        reading = read(form, "<think>\n", tools=TOOLS, tool_choice=choice)
        assert accepts(reading.sampling.structured_output, "Hm </think>\n" + reply)
        assert not accepts(reading.sampling.structured_output, reply)
        assert reading.new_parser is not None
        part = reading.new_parser().push("Hm </think>\n" + reply, last=True)
        assert part.reasoning == "Hm"
        assert part.content == ""
        assert [(call.name, call.arguments) for call in part.tool_calls] == [("now", "{}")]


def test_without_tools_or_thoughts_a_reply_is_its_text() -> None:
    assert read(ReplyFormat(HermesToolParser)).new_parser is None
    assert (
        read(ReplyFormat(HermesToolParser), tools=TOOLS, tool_choice=ToolChoice(kind="none")).new_parser
        is None
    )


def test_what_cannot_be_had_is_refused() -> None:
    grammar = StructuredOutput(grammar='start: "x"')
    with pytest.raises(Unsupported, match="--tool-call-parser") as unknown:
        read(ReplyFormat(), tools=TOOLS)
    assert unknown.value.param == "tool_choice"
    with pytest.raises(InvalidRequest, match="cannot be combined with response_format"):
        read(ReplyFormat(), "", SCHEMA, tools=TOOLS, tool_choice=ToolChoice(kind="required"))
    with pytest.raises(Unsupported, match="pythonic"):
        read(ReplyFormat(PythonicToolParser), tools=TOOLS)
    with pytest.raises(InvalidRequest, match="a grammar cannot be combined with thoughts"):
        read(ReplyFormat(reasoning=THINK), "<think>\n", grammar)
    assert read(ReplyFormat(reasoning=THINK), "assistant\n", grammar).sampling.structured_output == grammar


@pytest.mark.parametrize(
    ("tools", "choice", "said", "param"),
    [
        ((), ToolChoice(kind="required"), "it needs tools", "tool_choice"),
        (TOOLS, ToolChoice(kind="named", name="x"), "'get_weather', 'plant', 'now'", "tool_choice"),
        ((NOW, NOW), ToolChoice(), "two tools are named 'now'", "tools"),
    ],
)
def test_wrong_choices_are_named(tools: tuple[Tool, ...], choice: ToolChoice, said: str, param: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as raised:
        read(ReplyFormat(HermesToolParser), tools=tools, tool_choice=choice)
    assert raised.value.param == param


TEMPLATES = Path(__file__).parents[2] / "text" / "templates"


@pytest.mark.parametrize(
    ("template", "tools", "closing"),
    [
        ("qwen25", "hermes", None),
        ("qwen3", "hermes", "</think>"),
        ("hermes_tool_use", "hermes", None),
        ("llama31", "llama3_json", None),
        ("mistral", "mistral", None),
        ("parts", "generic", None),
    ],
)
def test_the_template_shows_the_format(template: str, tools: str | None, closing: str | None) -> None:
    source = (TEMPLATES / f"{template}.jinja").read_text()
    form = ReplyFormat.choose(source, {}, ChatSettings())
    assert (form.tools.name if form.tools else None) == tools
    assert (form.reasoning.closing if form.reasoning else None) == closing
    off = ReplyFormat.choose(source, {}, ChatSettings(tool_call_parser="none", reasoning_parser="none"))
    assert (off.tools, off.reasoning) == (None, None)


def test_an_unknown_reasoning_parser_stops_the_start() -> None:
    with pytest.raises(ConfigError, match="must be auto, none, qwen3, deepseek_r1, mistral"):
        ReplyFormat.choose("", {}, ChatSettings(reasoning_parser="x"))
