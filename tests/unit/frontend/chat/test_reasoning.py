"""Thoughts are split from the answer, however a reply is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.chat.reasoning import REASONING_FORMATS, ReasoningFormat, ReasoningSplitter, Thoughts
from frontend.chat.reply import ReplyParser
from frontend.chat.tool_parsers.hermes import HermesToolParser

THINK = ReasoningFormat()


def read(pieces: list[str], *, is_open: bool = False, form: ReasoningFormat = THINK) -> tuple[str, str]:
    """Thoughts and answer."""
    splitter = ReasoningSplitter(form, Thoughts.OPEN if is_open else Thoughts.AHEAD)
    parts = [*map(splitter.push, pieces), splitter.finish()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("reply", "is_open", "expected"),
    [
        ("<think>\nHm, so\n\n it is.\n</think>\n\nYes. ", False, ("Hm, so\n\n it is.", "Yes. ")),
        ("Hm\n</think>\n\nYes", True, ("Hm", "Yes")),
        ("<think>\nHm</think>Yes", True, ("Hm", "Yes")),
        ("<think>\n\n</think>\n\nYes", False, ("", "Yes")),
        (" \n<think>Hm", False, ("Hm", "")),
        ("Hm <thi", True, ("Hm <thi", "")),
        ("\n Hm </thin", True, ("Hm </thin", "")),
        ("  Yes, <think>is a tag</think>\n", False, ("", "  Yes, <think>is a tag</think>\n")),
        ("<thing> </think>", False, ("", "<thing> </think>")),
        ("<think>a</think>b</think>c", False, ("a", "b</think>c")),
        ("<thi", False, ("", "<thi")),
        (" ", True, ("", "")),
        ("", False, ("", "")),
    ],
)
def test_thoughts_and_answer(reply: str, is_open: bool, expected: tuple[str, str], whole: bool) -> None:
    assert read([reply] if whole else list(reply), is_open=is_open) == expected


@given(
    fragments=st.lists(st.sampled_from(["<think>", "</think>", "a", "<", "think", " ", "\n", "/"])),
    is_open=st.booleans(),
    cuts=st.lists(st.integers(0, 60), max_size=6).map(sorted),
)
def test_no_cut_changes_what_is_read(fragments: list[str], is_open: bool, cuts: list[int]) -> None:
    reply = "".join(fragments)
    pieces = [reply[start:end] for start, end in zip([0, *cuts], [*cuts, len(reply)], strict=True)]
    if cuts and cuts[-1] > len(reply):
        pieces = list(reply)
    assert read(pieces, is_open=is_open) == read([reply], is_open=is_open)


@pytest.mark.parametrize(
    ("prompt_end", "continued", "name", "expected"),
    [
        ("<|im_start|>assistant\n", None, "qwen3", Thoughts.AHEAD),
        ("<|im_start|>assistant\n<think>\n", None, "qwen3", Thoughts.OPEN),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", None, "qwen3", Thoughts.OVER),
        ("what does <think> mean?<|im_end|>\n<|im_start|>assistant\n", None, "qwen3", Thoughts.AHEAD),
        ("<think>\nHm, that", "<think>\nHm, that", "qwen3", Thoughts.OPEN),
        ("<think>\n\n</think>\n\nIt is", "It is", "qwen3", Thoughts.OVER),
        ("<|assistant|>", None, "deepseek_r1", Thoughts.OPEN),
        ("<|assistant|><think>\n\n</think>\n\n", None, "deepseek_r1", Thoughts.OVER),
        ("[/INST]", None, "mistral", Thoughts.AHEAD),
    ],
)
def test_the_prompt_says_where_a_reply_begins(
    prompt_end: str, continued: str | None, name: str, expected: Thoughts
) -> None:
    assert REASONING_FORMATS[name].at_begin(prompt_end, continued) is expected


def test_an_answer_that_has_begun_is_all_answer() -> None:
    splitter = ReasoningSplitter(THINK, Thoughts.OVER)
    assert splitter.push("<think>is a tag</think>") == ("", "<think>is a tag</think>")
    assert splitter.finish() == ("", "")


@pytest.mark.parametrize("include_reasoning", [True, False])
def test_calls_are_found_behind_the_thoughts_only(include_reasoning: bool) -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    reply = ReplyParser(
        reasoning=ReasoningSplitter(THINK, Thoughts.AHEAD),
        tools=HermesToolParser(("f",)),
        include_reasoning=include_reasoning,
    )
    part = reply.push(f"<think>I could {call}</think>\n\nFine.\n{call}\n", last=True)
    assert part.reasoning == (f"I could {call}" if include_reasoning else "")
    assert part.content == "Fine."
    assert [(delta.name, delta.arguments) for delta in part.tool_calls] == [("f", "{}")]
