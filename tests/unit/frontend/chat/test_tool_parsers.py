"""Calls are found in what models write, however it is cut, and nothing else is taken for one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend.chat.reply import ReplyParser
from frontend.chat.tool_parsers.forced import NamedCallParser, RequiredCallsParser
from frontend.chat.tool_parsers.generic import GenericToolParser
from frontend.chat.tool_parsers.hermes import HermesToolParser
from frontend.chat.tool_parsers.llama3_json import Llama3JsonToolParser
from frontend.chat.tool_parsers.mistral import MistralToolParser
from frontend.chat.tool_parsers.protocol import Text, ToolParser
from frontend.chat.tool_parsers.pythonic import PythonicToolParser
from frontend.chat.tool_parsers.registry import find_tool_parser
from pagewire.base.errors import ConfigError

NAMES = ("get_weather", "get_time")
PARIS = '{"city": "Paris"}'

Read = tuple[str, list[tuple[str, str]]]
"""Content, and name and arguments of each call."""


def read(parser: ToolParser, pieces: list[str], *, parallel: bool = True) -> Read:
    """The message that a reply stands for; checks on the way what holds for every stream."""
    reply = ReplyParser(reasoning=None, tools=parser, parallel=parallel)
    content = ""
    calls: list[list[str]] = []
    for part in [*(reply.push(piece, last=False) for piece in pieces), reply.push("", last=True)]:
        content += part.content
        for delta in part.tool_calls:
            if delta.index == len(calls):
                assert delta.id
                assert delta.name
                calls.append([delta.name, ""])
            else:
                assert delta.index == len(calls) - 1
                assert not delta.id
                assert not delta.name
            calls[delta.index][1] += delta.arguments
    return content, [(name, arguments) for name, arguments in calls]


def hermes(*objects: str) -> str:
    return "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in objects)


REPLIES: list[tuple[type[ToolParser], str, Read]] = [
    # Hermes: as documented, with text around, several, and what models get wrong.
    (
        HermesToolParser,
        hermes('{"name": "get_weather", "arguments": {"city": "Paris"}}'),
        ("", [("get_weather", PARIS)]),
    ),
    (
        HermesToolParser,
        "Let me look.\n\n"
        + hermes(
            '{"arguments": {"city": "Paris"}, "name": "get_weather"}', '{"name": "get_time", "arguments": {}}'
        ),
        ("Let me look.", [("get_weather", PARIS), ("get_time", "{}")]),
    ),
    (HermesToolParser, hermes('{"name": "get_time"}') + "\nDone.", ("\nDone.", [("get_time", "{}")])),
    (HermesToolParser, hermes('{"name": "get_time", "arguments": null}'), ("", [("get_time", "{}")])),
    (
        HermesToolParser,
        hermes('{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}'),
        ("", [("get_weather", PARIS)]),
    ),
    (
        HermesToolParser,
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}}</tool_call>!',
        ("!", [("get_weather", PARIS)]),
    ),
    (
        HermesToolParser,
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}</tool_call>',
        ("", [("get_weather", PARIS)]),
    ),
    (
        HermesToolParser,
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}',
        ("", [("get_weather", PARIS)]),
    ),
    (
        HermesToolParser,
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Par',
        ("", [("get_weather", '{"city": "Par')]),
    ),
    (
        HermesToolParser,
        '<tool_call>{"name": "get_weather", "arguments": {"a": "}\\"]{</tool_call>", "b": [1, {"c": null}]}}'
        "</tool_call>",
        ("", [("get_weather", '{"a": "}\\"]{</tool_call>", "b": [1, {"c": null}]}')]),
    ),
    (HermesToolParser, "no call <tool_call>here</tool_call> ", ("no call <tool_call>here</tool_call> ", [])),
    (HermesToolParser, "a <b> <tool_", ("a <b> <tool_", [])),
    (
        HermesToolParser,
        '<tool_call>{"arguments": {}}</tool_call>',
        ('<tool_call>{"arguments": {}}</tool_call>', []),
    ),
    (
        HermesToolParser,
        '<tool_call>{"name": "f", "arguments": [1]}',
        ('<tool_call>{"name": "f", "arguments": [1]}', []),
    ),
    (HermesToolParser, '<tool_call>{"name": 1.5, "arg', ('<tool_call>{"name": 1.5, "arg', [])),
    (
        HermesToolParser,
        '<tool_call><tool_call>{"id": 7, "name": "get_time", "arguments": {}}</tool_call>',
        ("<tool_call>", [("get_time", "{}")]),
    ),
    # Llama 3: no marks, so that only a known function with arguments is a call.
    (
        Llama3JsonToolParser,
        '{"name": "get_weather", "parameters": {"city": "Paris"}}',
        ("", [("get_weather", PARIS)]),
    ),
    (
        Llama3JsonToolParser,
        ' \n<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}',
        ("", [("get_weather", PARIS)]),
    ),
    (
        Llama3JsonToolParser,
        '{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "get_time", "arguments": {}};',
        ("", [("get_weather", PARIS), ("get_time", "{}")]),
    ),
    (
        Llama3JsonToolParser,
        '{"parameters": {"city": "Paris"}, "name": "get_weather"} That is it.',
        (" That is it.", [("get_weather", PARIS)]),
    ),
    (
        Llama3JsonToolParser,
        "I call:" + ' <|python_tag|>{"name": "get_time", "parameters": {}}' * 2,
        ("I call:", [("get_time", "{}"), ("get_time", "{}")]),
    ),
    (
        Llama3JsonToolParser,
        '{"name": "Alice", "parameters": {}}',
        ('{"name": "Alice", "parameters": {}}', []),
    ),
    (Llama3JsonToolParser, '{"name": "get_time", "age": 3}\n', ('{"name": "get_time", "age": 3}\n', [])),
    (Llama3JsonToolParser, "  {not json} ", ("  {not json} ", [])),
    (
        Llama3JsonToolParser,
        '<|python_tag|>search.call(query="x")',
        ('<|python_tag|>search.call(query="x")', []),
    ),
    (
        Llama3JsonToolParser,
        'Say {"name": "get_time", "parameters": {}}',
        ('Say {"name": "get_time", "parameters": {}}', []),
    ),
    (
        Llama3JsonToolParser,
        '{"name": "get_time", "parameters": {}}; {"name": "Bob"}',
        ('; {"name": "Bob"}', [("get_time", "{}")]),
    ),
    # Mistral: a list, one by one, with ids.
    (
        MistralToolParser,
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}},'
        ' {"name": "get_time", "arguments": {}}]',
        ("", [("get_weather", PARIS), ("get_time", "{}")]),
    ),
    (
        MistralToolParser,
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "a"}',
        ("", [("get_weather", PARIS)]),
    ),
    (
        MistralToolParser,
        'Well. [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_time[CALL_ID]a1b2c3d4e[ARGS] {}',
        ("Well.", [("get_weather", PARIS), ("get_time", "{}")]),
    ),
    (MistralToolParser, '[TOOL_CALLS]get_weather{"city": "Paris"}', ("", [("get_weather", PARIS)])),
    (MistralToolParser, "[TOOL_CALLS]what a day", ("[TOOL_CALLS]what a day", [])),
    (MistralToolParser, "[TOOL_CALLS]" + "a" * 600 + "{}", ("[TOOL_CALLS]" + "a" * 600 + "{}", [])),
    (MistralToolParser, "[TOOL_CALLS][1, 2]", ("[TOOL_CALLS][1, 2]", [])),
    (MistralToolParser, "[TOOL_CALLS][TOOL_CALLS]get_time{}", ("[TOOL_CALLS]", [("get_time", "{}")])),
    (MistralToolParser, "[TOOL_", ("[TOOL_", [])),
    # Python.
    (
        PythonicToolParser,
        '[get_weather(city="Paris"), get_time()]',
        ("", [("get_weather", PARIS), ("get_time", "{}")]),
    ),
    (PythonicToolParser, "[get_weather(city={1})]", ("[get_weather(city={1})]", [])),
    (PythonicToolParser, "[get_weather(1)]", ("[get_weather(1)]", [])),
    (PythonicToolParser, "[1, 2] is a list", ("[1, 2] is a list", [])),
    (PythonicToolParser, "[get_time(", ("[get_time(", [])),
]


@pytest.mark.parametrize(("kind", "reply", "expected"), REPLIES)
def test_a_reply_is_read_alike_whole_and_character_by_character(
    kind: type[ToolParser], reply: str, expected: Read
) -> None:
    assert read(kind(NAMES), [reply]) == expected
    assert read(kind(NAMES), list(reply)) == expected


FRAGMENTS = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "<|python_tag|>",
            "[TOOL_CALLS]",
            "[ARGS]",
            "[CALL_ID]",
            "tool_call",
        ),
        *(
            "get_weather",
            "get_time",
            '{"name": "get_time", ',
            '"arguments": {}}',
            '"parameters": {"a": [1]}}',
        ),
        *('{"name": "get_weather", "arguments": {"city": "Paris"}}', '"name"', "[get_time(", "a=1)]", "null"),
        *("{", "}", "[", "]", '"', "\\", ":", ",", ";", " ", "\n", "<", ">", "x", "é", "1"),
    ]
)


@pytest.mark.parametrize(
    "kind", [HermesToolParser, Llama3JsonToolParser, MistralToolParser, PythonicToolParser]
)
@given(data=st.data())
def test_no_cut_changes_what_is_read(kind: type[ToolParser], data: st.DataObject) -> None:
    reply = "".join(data.draw(st.lists(FRAGMENTS, max_size=25)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(reply)), max_size=8)))
    pieces = [reply[start:end] for start, end in zip([0, *cuts], [*cuts, len(reply)], strict=True)]
    whole = read(kind(NAMES), [reply])
    assert read(kind(NAMES), pieces) == whole
    assert read(kind(NAMES), list(reply)) == whole
    if not whole[1]:
        assert whole[0] == reply  # nothing is dropped of a reply without calls


VALUES = st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=8)
ARGUMENTS = st.dictionaries(st.text(max_size=4), VALUES | st.lists(VALUES, max_size=3), max_size=3)


@settings(max_examples=50)
@given(
    arguments=st.lists(ARGUMENTS, min_size=1, max_size=3),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 2]),
)
def test_any_arguments_come_back_as_they_were_written(
    arguments: list[dict[str, object]], ascii_only: bool, indent: int | None
) -> None:
    written = [json.dumps(each, ensure_ascii=ascii_only, indent=indent) for each in arguments]
    expected = ("", [("get_weather", each) for each in written])
    as_objects = [f'{{"name": "get_weather", "arguments": {each}}}' for each in written]
    as_parameters = [each.replace('"arguments"', '"parameters"', 1) for each in as_objects]
    assert read(HermesToolParser(NAMES), [hermes(*as_objects)]) == expected
    assert read(Llama3JsonToolParser(NAMES), ["; ".join(as_parameters)]) == expected
    assert read(MistralToolParser(NAMES), [f"[TOOL_CALLS][{', '.join(as_objects)}]"]) == expected
    by_one = "".join(f"[TOOL_CALLS]get_weather[ARGS]{each}" for each in written)
    assert read(MistralToolParser(NAMES), [by_one]) == expected
    assert read(RequiredCallsParser(), [f"[{','.join(as_parameters)}]"]) == expected
    assert read(RequiredCallsParser(), list(f" [ {' , '.join(as_parameters)} ] ")) == expected
    assert read(NamedCallParser("get_weather"), ["\n", *written[0]]) == ("", expected[1][:1])


def test_the_name_comes_before_the_arguments_and_arguments_come_in_pieces() -> None:
    reply = ReplyParser(reasoning=None, tools=HermesToolParser(NAMES))
    assert reply.push('<tool_call>{"name": "get_weather", "arguments": ', last=False).tool_calls == ()
    (first,) = reply.push('{"city"', last=False).tool_calls
    assert (first.index, first.name, first.arguments) == (0, "get_weather", '{"city"')
    assert first.id.startswith("call_")
    (second,) = reply.push(': "Par', last=False).tool_calls
    assert (second.index, second.id, second.name, second.arguments) == (0, "", "", ': "Par')


def test_without_parallel_calls_only_the_first_is_returned() -> None:
    reply = hermes(*['{"name": "get_time", "arguments": {}}'] * 2) + " And"
    for pieces in ([reply], list(reply)):
        assert read(HermesToolParser(NAMES), pieces, parallel=False) == (" And", [("get_time", "{}")])


def test_ids_are_the_formats_own_or_as_its_templates_want_them() -> None:
    reply = ReplyParser(reasoning=None, tools=MistralToolParser(NAMES))
    part = reply.push("[TOOL_CALLS]get_time[CALL_ID]abcdefghi[ARGS]{}[TOOL_CALLS]get_time{}", last=True)
    given_id, drawn = (call.id for call in part.tool_calls)
    assert given_id == "abcdefghi"
    assert len(drawn) == 9
    assert drawn.isalnum()


DOCUMENTED = Path(__file__).parents[4] / "docs" / "tool-parsers.md"


def test_the_documented_plugin_adds_a_parser_by_name_and_by_template(tmp_path: Path) -> None:
    plugin = tmp_path / "bang.py"
    plugin.write_text(DOCUMENTED.read_text().split("```python\n")[1].split("```")[0])
    for name, template in (("bang", ""), ("auto", "say !function")):
        parser = find_tool_parser(name, template, plugin)
        assert parser is not None
        assert read(parser(NAMES), ["!get", "_time"]) == ("", [("get_time", "{}")])
        assert read(parser(NAMES), ["get", "_time!"]) == ("get_time!", [])
        assert read(parser(NAMES), ["!unknown"]) == ("!unknown", [])
    assert find_tool_parser("auto", "say nothing", plugin) is GenericToolParser


def test_an_object_with_other_keys_is_text_as_soon_as_they_are_seen() -> None:
    parser = Llama3JsonToolParser(NAMES)
    assert parser.push('{"answer": ') == [Text('{"answer": ')]


@pytest.mark.parametrize(
    ("name", "plugin", "said"),
    [
        ("other", None, "must be auto, none, harmony, chatglm3, glm4, cohere, granite"),
        ("bang", "1 / 0", "division by zero"),
        ("bang", "x = 1", "no subclass of ToolParser"),
        (
            "bang",
            "from frontend.chat.tool_parsers.protocol import ToolParser\nclass P(ToolParser): pass",
            "P has no name",
        ),
    ],
)
def test_a_wrong_parser_stops_the_start(tmp_path: Path, name: str, plugin: str | None, said: str) -> None:
    path = None
    if plugin is not None:
        path = tmp_path / "plugin.py"
        path.write_text(plugin)
    with pytest.raises(ConfigError, match=said):
        find_tool_parser(name, "", path)
