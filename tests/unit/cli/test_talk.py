"""What can be done in a conversation, without a terminal and a server."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pagewire.base.errors import InvalidRequest, Overloaded
from pagewire.cli.talk.answer import read_answer
from pagewire.cli.talk.commands import COMMANDS, run_command
from pagewire.cli.talk.conversation import Conversation
from pagewire.cli.talk.display import Display
from pagewire.cli.talk.reader import is_open, unquoted
from pagewire.cli.talk.settings import SETTINGS, changed
from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.wire.sampling_params import SamplingParams

Events = Sequence[pb.GenerateResponse | BaseException]
ENDED = pb.GenerateResponse(
    finished=pb.Finished(
        finish_reason=pb.FINISH_REASON_STOP,
        usage=pb.Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=2),
    )
)


def delta(**fields: Any) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(**fields))


class ScriptedClient:
    """Answers with what it is told to; keeps what it is asked."""

    def __init__(self, *answers: Events) -> None:
        self.answers = list(answers)
        self.asked: list[dict[str, Any]] = []

    def events(self, **fields: Any) -> Iterator[pb.GenerateResponse]:
        self.asked.append(fields)
        for event in self.answers.pop(0):
            if isinstance(event, BaseException):
                raise event
            yield event


class ScriptedReader:
    is_interactive = True

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)
        self.prompts: list[str] = []

    def read(self, prompt: str = "") -> str:
        self.prompts.append(prompt)
        return self.lines.pop(0)


def talk(*answers: Events, **settings: Any) -> tuple[Conversation, ScriptedClient, io.StringIO]:
    client, output = ScriptedClient(*answers), io.StringIO()
    console = Console(file=output, width=200)
    return Conversation(client, "m", {}, settings.pop("system", None), console, **settings), client, output


def said(conversation: Conversation) -> list[tuple[str, str]]:
    return [(str(each["role"]), str(each["content"])) for each in conversation.whole()]


def test_a_question_is_answered_again_with_what_was_said_before_it() -> None:
    conversation, client, _ = talk([delta(text="one")], [delta(text="two")], [delta(text="again")])
    conversation.answer("first")
    conversation.answer("second")
    run_command(conversation, "/regenerate")
    assert client.asked[1]["messages"] == client.asked[2]["messages"]
    assert said(conversation)[-2:] == [("user", "second"), ("assistant", "again")]


def test_what_fails_leaves_the_conversation_as_it_was() -> None:
    full = Overloaded("too many requests are waiting")
    conversation, _, output = talk([delta(text="one")], [full], [delta(text="par"), full])
    conversation.answer("first")
    before = list(conversation.messages)
    conversation.answer("second")
    run_command(conversation, "/regenerate")
    assert conversation.messages == before
    assert output.getvalue().count("error: too many requests are waiting") == 2


def test_an_answer_that_is_stopped_stays_as_far_as_it_came() -> None:
    conversation, _, output = talk([delta(text="par"), KeyboardInterrupt()], [KeyboardInterrupt()])
    conversation.answer("first")
    assert said(conversation) == [("user", "first"), ("assistant", "par")]
    assert "par [stopped]\n" in output.getvalue()
    conversation.answer("second")
    assert said(conversation) == [("user", "first"), ("assistant", "par")]


def test_the_reader_says_what_a_tool_returns() -> None:
    start = pb.ToolCallDelta(index=0, id="c1", name="weather", arguments_json='{"city":')
    rest = pb.ToolCallDelta(index=0, arguments_json='"Rome"}')
    call = [delta(tool_calls=[start]), delta(tool_calls=[rest])]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    conversation, client, output = talk(call, [delta(text="It rains.")], tools=tools)
    conversation.reader = reader = ScriptedReader("rain")
    conversation.answer("How is it in Rome?")
    assert output.getvalue() == 'calls weather({"city":"Rome"})\nIt rains.\n'
    assert reader.prompts == ["weather returns: "]
    assert client.asked[1]["tools"] == tools
    assert client.asked[1]["messages"][-1] == {"role": "tool", "tool_call_id": "c1", "content": "rain"}


def test_thoughts_are_shown_apart_and_kept_out_of_files_and_pipes() -> None:
    events = [delta(reasoning="2 and 2"), delta(reasoning=" is 4"), delta(text="4"), ENDED]
    output = io.StringIO()
    answer = read_answer(iter(events), Display(Console(file=output), thoughts=True))
    assert output.getvalue() == "thinking: 2 and 2 is 4\n4\n"
    assert answer.message() == {"role": "assistant", "content": "4", "reasoning": "2 and 2 is 4"}
    conversation, _, piped = talk(events)
    conversation.answer("2 + 2?")
    assert piped.getvalue() == "4\n"


def test_a_model_cannot_steer_the_terminal() -> None:
    output = io.StringIO()
    read_answer(
        iter([delta(text="a\x1b]0;title\x07\x9b2Jb\r\nc")]), Display(Console(file=output), thoughts=True)
    )
    assert output.getvalue() == "a]0;title2Jb\nc\n"


def test_what_is_set_is_sent_until_it_is_given_back() -> None:
    conversation, client, output = talk([ENDED], [ENDED])
    for line in (
        "/set temperature 0.2",
        "/set stop=END",
        '/set stop ["a", "b"]',
        "/set seed 7",
        "/think off",
    ):
        run_command(conversation, line)
    conversation.answer("one")
    assert client.asked[0]["sampling_params"] == {"temperature": 0.2, "stop": ["a", "b"], "seed": 7}
    assert client.asked[0]["chat_template_kwargs"] == {"enable_thinking": False}
    for name in ("temperature", "stop", "seed"):
        run_command(conversation, f"/set {name} default")
    conversation.answer("two")
    assert client.asked[1]["sampling_params"] == {}
    run_command(conversation, "/set")
    assert all(name in output.getvalue() for name in SETTINGS)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperatur", "1", r"no setting 'temperatur' \(did you mean temperature\?\)"),
        ("temperature", "warm", "temperature: 'warm' is not a number"),
        ("temperature", "-1", "temperature is -1.0; it must be at least 0"),
        ("max_tokens", "1.5", "max_tokens: '1.5' is not a whole number"),
        ("stop", "[1]", "is not a JSON list of texts"),
    ],
)
def test_what_cannot_be_set_is_said(name: str, value: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        changed({}, name, value)


def test_settings_are_sampling_parameters() -> None:
    assert set(SETTINGS) <= set(SamplingParams.__dataclass_fields__)


def test_the_system_prompt_can_change_and_go() -> None:
    conversation, _, _ = talk([delta(text="hi")], system="Be kind.")
    conversation.answer("hello")
    run_command(conversation, "/system Be brief.")
    assert said(conversation)[0] == ("system", "Be brief.")
    run_command(conversation, "/clear")
    assert said(conversation) == [("system", "Be brief.")]
    run_command(conversation, "/system off")
    assert said(conversation) == []


def test_a_conversation_is_saved_and_goes_on_elsewhere(tmp_path: Path) -> None:
    conversation, _, _ = talk([delta(text="hi")], system="Be kind.")
    conversation.answer("hello")
    run_command(conversation, "/set temperature 0")
    run_command(conversation, f"/save {tmp_path}/talk.json")
    other, _, _ = talk()
    run_command(other, f"/load {tmp_path}/talk.json")
    assert said(other) == [("system", "Be kind."), ("user", "hello"), ("assistant", "hi")]
    assert other.sampling == {"temperature": 0.0}
    (tmp_path / "list.json").write_text(json.dumps([{"role": "user", "content": "only"}]))
    run_command(other, f"/load {tmp_path}/list.json")
    assert said(other) == [("user", "only")]


def test_files_that_are_no_conversations_are_neither_read_nor_lost(tmp_path: Path) -> None:
    conversation, _, output = talk()
    for name, content in {"a": "{", "b": '{"messages": 3}', "c": '[{"role": 3}]', "d": "\xff"}.items():
        (tmp_path / name).write_text(content, encoding="latin-1")
        run_command(conversation, f"/load {tmp_path}/{name}")
        run_command(conversation, f"/save {tmp_path}/{name}")
        assert (tmp_path / name).read_text(encoding="latin-1") == content
    assert output.getvalue().count("exists and is no conversation") == 4
    for line in (
        "/load",
        "/save",
        f"/load {tmp_path}/none",
        f"/save {tmp_path}/no/such",
        f"/load {tmp_path}",
    ):
        run_command(conversation, line)
    assert output.getvalue().count("error: ") == 13


def test_stats_are_those_of_the_last_answer_and_of_all() -> None:
    conversation, _, output = talk([delta(token_ids=[1]), delta(token_ids=[2]), ENDED], [ENDED])
    run_command(conversation, "/stats")
    conversation.answer("one")
    conversation.answer("two")
    run_command(conversation, "/stats")
    text = output.getvalue()
    assert "nothing was answered yet" in text
    assert "10 tokens, 4 of them cached" in text
    assert "20 tokens, 8 of them cached" in text
    assert "tokens/s" in text


def test_an_unknown_command_gets_the_nearest() -> None:
    conversation, _, output = talk()
    run_command(conversation, "/regenrate")
    assert output.getvalue() == "unknown command /regenrate (did you mean /regenerate?): /help lists them\n"


def test_text_between_quotes_of_three_is_one() -> None:
    assert is_open('"""a')
    assert is_open('"""')
    assert not is_open('"""a\nb"""')
    assert not is_open("a")
    assert unquoted('"""\na\n\nb\n"""') == "a\n\nb"
    assert unquoted(' say """x"""') == ' say """x"""'


def test_the_docs_explain_every_command() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "terminal.md").read_text()
    assert [name for name in COMMANDS if f"`{name}" not in page] == []
