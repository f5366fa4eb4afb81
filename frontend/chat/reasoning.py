"""Splits what a model thinks from what it answers, where its format marks that: <think> ... </think>."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from frontend.chat.marker_search import split_at_marker


class Thoughts(Enum):
    """Where a reply begins."""

    AHEAD = auto()
    """Before thoughts, if there are any."""
    OPEN = auto()
    """Within them."""
    OVER = auto()
    """Behind them."""


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

    def at_begin(self, prompt_end: str, continued: str | None) -> Thoughts:
        """Where the reply to a prompt begins.

        Args:
            prompt_end: the end of the rendered prompt, at least as long as a mark.
            continued: what the turn says already that the model is to go on with, if it is.
        """
        if continued is not None:
            is_open = continued.rfind(self.opening) > continued.rfind(self.closing)
            return Thoughts.OPEN if is_open else Thoughts.OVER
        end = prompt_end.rstrip()
        if end.endswith(self.closing):
            return Thoughts.OVER
        return Thoughts.OPEN if self.always or end.endswith(self.opening) else Thoughts.AHEAD


REASONING_FORMATS = {
    "qwen3": ReasoningFormat(),
    "deepseek_r1": ReasoningFormat(always=True),
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
    "cohere": ReasoningFormat("<|START_THINKING|>", "<|END_THINKING|>"),
}
"""By the name that `--reasoning-parser` takes."""


class _In(Enum):
    START = auto()
    THOUGHTS = auto()
    ANSWER = auto()


class ReasoningSplitter:
    """Reads one reply as it comes. White space around thoughts and before the answer belongs to neither."""

    def __init__(self, form: ReasoningFormat, begins: Thoughts) -> None:
        self._form = form
        self._pending = ""
        self._is_open = begins is Thoughts.OPEN
        self._state = _In.ANSWER if begins is Thoughts.OVER else _In.START
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
