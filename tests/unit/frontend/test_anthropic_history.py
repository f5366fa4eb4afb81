"""What clients of Anthropic's API keep in their history is taken, and rendered as the template can."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend.chat.conversation import Conversation
from frontend.generation.answer import Answer, Sink
from frontend.generation.events import Delta, Event, Finished, FinishReason, Usage
from frontend.generation.message_parser import ToolCallDelta
from frontend.http.anthropic.bodies import CountTokensBody
from frontend.http.anthropic.message_shape import MessageShape
from frontend.http.body import parse
from frontend.text.chat_template import ChatTemplate
from pagewire.base.errors import InvalidRequest, Unsupported

TEMPLATES = Path(__file__).parents[1] / "text" / "templates"
USER = {"role": "user", "content": "hi"}
COUNTS = Usage(9, 4, 5)


def conversation(*messages: dict[str, Any], **fields: Any) -> Conversation:
    body = {"messages": list(messages), **fields}
    return parse(CountTokensBody, json.dumps(body).encode()).to_converse()


def turns(*messages: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return conversation(*messages, **fields).messages


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def call(given: Any, call_id: str = "1") -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": "f", "input": given}


def result(content: Any = None, call_id: str = "1", **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **fields}


class Told(Answer):
    """An answer whose events are known."""

    def __init__(self, rounds: Sequence[list[Event]]) -> None:
        super().__init__("id")
        self._rounds = rounds

    @property
    def first_token_at(self) -> float | None:
        return None

    @property
    def usage(self) -> Usage:
        return COUNTS

    async def rounds(self, sink: Sink | None = None) -> AsyncGenerator[list[Event], None]:
        for events in self._rounds:
            yield events


def whole(rounds: Sequence[list[Event]]) -> dict[str, Any]:
    shape = MessageShape(message_id="msg_1", model="m", max_tokens=5)
    message = asyncio.run(shape.whole(Told(rounds)))
    return {"role": message["role"], "content": message["content"]}


def streamed(rounds: Sequence[list[Event]]) -> dict[str, Any]:
    """The message that a simple client puts together: it leaves calls' inputs as the text that they are."""
    shape = MessageShape(message_id="msg_1", model="m", max_tokens=5)
    frames = b"".join(shape.frames(events, Told(rounds)) for events in rounds).decode()
    events = [json.loads(frame.split("\ndata: ", 1)[1]) for frame in frames.strip("\n").split("\n\n")]
    blocks: list[dict[str, Any]] = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append({**event["content_block"]})
            if blocks[-1]["type"] == "tool_use":
                blocks[-1]["input"] = ""
        elif event["type"] == "content_block_delta":
            block, delta = blocks[event["index"]], event["delta"]
            assert block is blocks[-1]
            more = next(value for name, value in delta.items() if name != "type")
            block[{"input_json_delta": "input"}.get(delta["type"], delta["type"].removesuffix("_delta"))] += (
                more
            )
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    return {"role": "assistant", "content": blocks}


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
ARGUMENTS = st.one_of(
    TEXTS,
    st.sampled_from(['{"city": "Ro', "[1]", "null", "{", '{"a": 1}', '{"a": {"b": [', '{"a": NaN}', ""]),
    st.dictionaries(TEXTS, TEXTS, max_size=2).map(json.dumps),
)


@st.composite
def answers(draw: st.DrawFn) -> list[list[Event]]:
    """Rounds of events, as a reply's parser makes them: thoughts, text, and calls whose arguments come in
    pieces."""
    rounds: list[list[Event]] = []

    def say(said: str = "", reasoning: str = "", *calls: ToolCallDelta) -> None:
        rounds.append([Delta([1], said, [], COUNTS, reasoning=reasoning, tool_calls=calls)])

    for thought in draw(st.lists(TEXTS, max_size=2)):
        say("", thought)
    for said in draw(st.lists(TEXTS, max_size=2)):
        say(said)
    for index, arguments in enumerate(draw(st.lists(ARGUMENTS, max_size=3))):
        half = draw(st.integers(0, len(arguments)))
        say(draw(TEXTS), "", ToolCallDelta(index, f"call_{index}", "f", arguments[:half]))
        say(draw(TEXTS), "", ToolCallDelta(index, arguments=arguments[half:]))
    reason = draw(st.sampled_from([FinishReason.STOP, FinishReason.LENGTH, FinishReason.TOOL_CALLS]))
    return [*rounds, [Finished(reason, COUNTS)]]


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> list[ChatTemplate]:
    """Of families that take any number of calls, whatever their ids."""
    directory = tmp_path_factory.mktemp("none")
    sources = [(TEMPLATES / f"{name}.jinja").read_text() for name in ("qwen25", "qwen3", "hermes_tool_use")]
    sources.append(json.loads((smollm2_dir / "tokenizer_config.json").read_text())["chat_template"])
    loaded = [ChatTemplate.load(directory, source) for source in sources]
    return [template for template in loaded if template is not None]


@settings(max_examples=60)
@given(rounds=answers())
def test_answers_can_be_sent_back_as_they_came(
    templates: list[ChatTemplate], rounds: list[list[Event]]
) -> None:
    both = [whole(rounds), streamed(rounds)]
    names = ("type", "text", "thinking", "signature", "id", "name")
    told, shown = [[[block.get(name) for name in names] for block in each["content"]] for each in both]
    assert told == shown
    for message in both:
        results = [result("done", block["id"]) for block in message["content"] if block["type"] == "tool_use"]
        for history in ([USER, message, user(*results, text("on"))], [USER, message]):
            talk = conversation(*history, tools=[{"name": "f"}])
            for template in templates:
                template.render(talk)


def test_results_are_turns_of_their_own_before_the_text_that_comes_with_them() -> None:
    assert turns(
        USER,
        assistant(text("I look."), call({"a": 1}), call({}, "2")),
        user(text("and?"), result("sun"), result([text("rain"), text("wind")], "2")),
    ) == [
        USER,
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
                {"id": "2", "type": "function", "function": {"name": "f", "arguments": {}}},
            ],
        },
        {"role": "tool", "tool_call_id": "1", "name": "f", "content": "sun"},
        {"role": "tool", "tool_call_id": "2", "name": "f", "content": "rain\nwind"},
        {"role": "user", "content": "and?"},
    ]


def test_a_result_without_its_call_is_taken() -> None:
    """The beginning of the conversation was dropped."""
    [turn] = turns(user(result("sun", "lost")))
    assert turn == {"role": "tool", "tool_call_id": "lost", "content": "sun"}


@pytest.mark.parametrize(
    ("content", "is_error", "shown"),
    [
        (None, None, ""),
        ([], False, ""),
        ("no such file", True, "Error: no such file"),
        ("error 2", True, "error 2"),
        ([{"type": "image", "source": {}}, text("a")], None, "[an image, which this model cannot see]\na"),
        ([{"type": "tool_reference", "tool_name": "f"}], None, ""),
        (
            [{"type": "search_result", "source": "http://x", "title": "T", "content": [text("found")]}],
            None,
            "T\nhttp://x\nfound",
        ),
    ],
)
def test_results_of_every_form_are_read(content: Any, is_error: bool | None, shown: str) -> None:
    assert turns(user(result(content, is_error=is_error)))[-1]["content"] == shown


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        (None, {}),
        ("", {}),
        ({"a": 1}, {"a": 1}),
        ('{"a": 1}', {"a": 1}),
        ('{"a": ', '{"a": '),
        ("[1]", "[1]"),
        ([1], "[1]"),
        (7, "7"),
    ],
)
def test_inputs_of_every_form_are_taken(given: Any, arguments: dict[str, Any] | str) -> None:
    [function] = [each["function"] for each in turns(USER, assistant(call(given)))[-1]["tool_calls"]]
    assert function["arguments"] == arguments


def test_messages_of_one_role_are_joined() -> None:
    assert turns(USER, user(text("a"), text("b")), assistant(text("Par")), assistant(text("is.")), USER) == [
        {"role": "user", "content": "hi\na\nb"},
        {"role": "assistant", "content": "Paris."},
        USER,
    ]


def test_a_systems_text_is_one_turn() -> None:
    told = turns({"role": "system", "content": "c"}, USER, system=[text("a"), text("b")])
    assert told[0] == {"role": "system", "content": "a\nb\nc"}
    billed = turns(USER, system="x-anthropic-billing-header: cch=1;\nBe brief.")
    assert billed[0]["content"] == "Be brief."
    assert turns(USER, system=[]) == turns(USER, system="") == [USER]


def test_thoughts_need_no_signature_and_what_only_anthropic_can_read_is_left_out() -> None:
    thoughts = {"type": "thinking", "thinking": "Hm."}
    foreign = [
        {"type": "redacted_thinking", "data": "x"},
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": [{"encrypted_content": "x"}]},
    ]
    assert turns(USER, assistant(thoughts, *foreign, text("Yes.")), USER)[1] == {
        "role": "assistant",
        "content": "Yes.",
        "reasoning_content": "Hm.",
    }


def test_a_text_document_is_read_and_another_is_refused() -> None:
    source = {"type": "text", "media_type": "text/plain", "data": "body"}
    [turn] = turns(user({"type": "document", "source": source, "title": "T", "context": "C"}, text("?")))
    assert turn["content"] == "T\nC\nbody\n?"
    blocks = {"type": "content", "content": [text("a"), text("b")]}
    assert turns(user({"type": "document", "source": blocks}))[0]["content"] == "a\nb"
    with pytest.raises(InvalidRequest, match=r"provide messages\[0\]\.content\[0\]\.source\.data"):
        turns(user({"type": "document", "source": {"type": "text"}}))
    with pytest.raises(Unsupported, match="type is 'url'"):
        turns(user({"type": "document", "source": {"type": "url", "url": "http://x"}}))


@pytest.mark.parametrize(
    ("last", "continues"),
    [
        ([text("Par")], True),
        ([{"type": "thinking", "thinking": "Hm."}, text("Par")], True),
        ([text("I look."), call({})], False),
        ([{"type": "thinking", "thinking": "Hm."}], False),
    ],
)
def test_a_last_message_with_text_is_gone_on_with(last: list[dict[str, Any]], continues: bool) -> None:
    talk = conversation(USER, assistant(*last))
    assert (talk.continue_final_message, talk.add_generation_prompt) == (continues, not continues)
    assert talk.messages[-1]["role"] == "assistant"


@pytest.mark.parametrize("content", [None, "", [], [text("")], [{"type": "redacted_thinking", "data": ""}]])
def test_a_message_without_anything_in_it_is_taken(content: Any) -> None:
    empty = {"role": "assistant", "content": content}
    assert turns(USER, empty) == [USER]
    assert turns(USER, empty, USER) == [USER, {"role": "assistant", "content": ""}, USER]
    assert turns({"role": "user", "content": content}) == [{"role": "user", "content": ""}]


@pytest.mark.parametrize(
    ("messages", "num_characters"),
    [
        ([{"role": "user", "content": "a" * 1000}] * 6000, 6000 * 1001 - 1),
        (
            [{"role": "assistant", "content": "a" * 1000}, USER] * 3 + [assistant(text("a" * 1000))] * 6000,
            None,
        ),
        ([USER, assistant(*[{"type": "thinking", "thinking": "a" * 1000}] * 6000)], 2),
    ],
    ids=["users", "assistants", "thoughts"],
)
def test_what_is_joined_takes_no_longer_than_it_is_long(
    messages: list[dict[str, Any]], num_characters: int | None
) -> None:
    body = parse(CountTokensBody, json.dumps({"messages": messages}).encode())
    began = time.process_time()
    [first, *_] = body.to_converse().messages
    assert time.process_time() - began < 1.0
    if num_characters is not None:
        assert len(first["content"]) == num_characters
