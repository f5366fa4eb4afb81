"""Splits what a model thinks from what it answers, where its format marks that: <think> ... </think>."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from frontend.chat.tool_parsers.scanning import split_at_marker


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a family of models marks its thoughts.

    Attributes:
        opening, closing: the marks.
        always: whether a reply begins with thoughts even where neither prompt nor reply opens them.
    """

    opening: str = "<think>"
    closing: str = "</think>"
    always: bool = False

    def is_open(self, prompt_end: str) -> bool:
        """Whether a reply to this prompt begins within the thoughts.

        Args:
            prompt_end: the end of the rendered prompt, from the beginning of the assistant's turn on if that
                is known to be in it.
        """
        end = prompt_end.rstrip()
        if end.endswith(self.opening):
            return True
        return self.always and not end.endswith(self.closing)


REASONING_FORMATS = {
    "qwen3": ReasoningFormat(),
    "deepseek_r1": ReasoningFormat(always=True),
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
}
"""By the name that `--reasoning-parser` takes."""


class _In(Enum):
    START = auto()
    THOUGHTS = auto()
    ANSWER = auto()


class ReasoningSplitter:
    """Reads one reply as it comes. White space around thoughts and before the answer belongs to neither."""

    def __init__(self, form: ReasoningFormat, *, is_open: bool) -> None:
        """Args:
        is_open: whether the reply begins within the thoughts.
        """
        self._form = form
        self._pending = ""
        self._is_open = is_open
        self._state = _In.START
        self._thoughts_begun = False
        self._after_thoughts = False

    def push(self, text: str) -> tuple[str, str]:
        """Takes more of the reply; what is certain of its thoughts and of its answer."""
        self._pending += text
        if self._state is _In.START:
            self._start()
        thoughts = self._think() if self._state is _In.THOUGHTS else ""
        return thoughts, self._answer() if self._state is _In.ANSWER else ""

    def finish(self) -> tuple[str, str]:
        """The same of what was held back."""
        rest, self._pending = self._pending, ""
        if self._state is _In.THOUGHTS or (self._state is _In.START and self._is_open):
            return rest.rstrip() if self._thoughts_begun else rest.strip(), ""
        return "", rest

    def _start(self) -> None:
        """Before the first character that is no white space; the opening mark may come even where the
        thoughts are open already."""
        text = self._pending.lstrip()
        if text.startswith(self._form.opening):
            self._pending = text.removeprefix(self._form.opening)
            self._state = _In.THOUGHTS
        elif not self._form.opening.startswith(text):
            self._state = _In.THOUGHTS if self._is_open else _In.ANSWER

    def _think(self) -> str:
        text, closing, rest = split_at_marker(self._pending, (self._form.closing,))
        if not self._thoughts_begun:
            text = text.lstrip()
        self._thoughts_begun = self._thoughts_begun or bool(text)
        if closing is not None:
            self._pending, self._state, self._after_thoughts = rest, _In.ANSWER, True
            return text.rstrip()
        shown = text.rstrip()
        self._pending = text[len(shown) :] + rest
        return shown

    def _answer(self) -> str:
        text, self._pending = self._pending, ""
        if self._after_thoughts:
            text = text.lstrip()
            self._after_thoughts = not text
        return text
