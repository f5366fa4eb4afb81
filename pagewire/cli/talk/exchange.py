"""What was said to a model, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pagewire.base.errors import PagewireError
from pagewire.cli.talk.answer import Answer, read_answer
from pagewire.cli.talk.display import Display
from pagewire.cli.talk.reader import Reader
from pagewire.cli.talk.stats import AnswerStats

if TYPE_CHECKING:
    from rich.console import Console

    from pagewire.client import Client


class Exchange:
    """What was said, and how to go on.

    Attributes:
        model: the name that the server knows it by.
        messages: what was said so far, without the system prompt. An answer that was stopped stays as far as
            it came; one that failed is taken back together with its question.
        system: what the model is told first.
        sampling: parameters that differ from the model's own defaults.
        thinking: whether templates that know it are asked to have the model think; None leaves it to them.
        shows_thoughts: whether thoughts are shown, which only a terminal does at first.
        last, total: counts of the last answer and of all.
        reader: who is asked what tools return.
        has_left: whether the reader wants to go.
    """

    def __init__(
        self,
        client: Client,
        model: str,
        sampling: Mapping[str, Any],
        system: str | None,
        console: Console,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.model = model
        self.messages: list[Mapping[str, Any]] = []
        self.system = system
        self.sampling = dict(sampling)
        self.thinking: bool | None = None
        self.shows_thoughts = console.is_terminal
        self.last: AnswerStats | None = None
        self.total = AnswerStats()
        self.reader: Reader | None = None
        self.has_left = False
        self._client = client
        self._console = console
        self._tools = tools

    def say(self, text: str) -> None:
        """One line that is no part of the conversation."""
        self._console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def complain(self, text: str) -> None:
        """One line about what went wrong."""
        self._console.print(f"error: {text}", style="red", markup=False, highlight=False, soft_wrap=True)

    def answer(self, question: str) -> None:
        """Streams the answer to the console and keeps both in the conversation."""
        before = list(self.messages)
        self.messages.append({"role": "user", "content": question})
        self._reply(before)

    def regenerate(self) -> None:
        """Answers the last question again; the answer that there was is forgotten, unless this one fails."""
        questions = [index for index, each in enumerate(self.messages) if each.get("role") == "user"]
        if not questions:
            self.say("nothing was asked yet")
            return
        before = list(self.messages)
        del self.messages[questions[-1] + 1 :]
        self._reply(before)

    def clear(self) -> None:
        """Forgets what was said; the system prompt and the settings stay."""
        self.messages.clear()

    def leave(self) -> None:
        """Says that this is the end."""
        self.has_left = True

    def whole(self) -> list[Mapping[str, Any]]:
        """The messages with the system prompt."""
        opening = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*opening, *self.messages]

    def restore(self, messages: Sequence[Mapping[str, Any]], sampling: Mapping[str, Any]) -> None:
        """Goes on from other messages, of which the first may be the system's."""
        has_system = bool(messages) and messages[0].get("role") == "system"
        self.system = str(messages[0].get("content")) if has_system else None
        self.messages = list(messages[1:] if has_system else messages)
        self.sampling = dict(sampling)

    def _reply(self, before: list[Mapping[str, Any]]) -> None:
        """Has the last question answered. `before` is what the conversation is put back to if that fails, or
        is stopped before anything came."""
        try:
            answer = self._stream()
            while answer.tool_calls and not answer.stopped:
                self.messages.append(answer.message())
                self.messages += self._tool_results(answer)
                answer = self._stream()
        except (PagewireError, KeyboardInterrupt) as error:
            self.messages = before
            if isinstance(error, PagewireError):
                self.complain(error.message)
            return
        except EOFError:
            self.messages = before
            self.leave()
            return
        if answer.is_empty and answer.stopped:
            self.messages = before
        else:
            self.messages.append(answer.message())

    def _stream(self) -> Answer:
        events = self._client.events(
            messages=self.whole(), sampling_params=self.sampling, model=self.model, **self._fields()
        )
        answer = read_answer(events, Display(self._console, thoughts=self.shows_thoughts))
        self.last = answer.stats
        self.total.add(answer.stats)
        return answer

    def _fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"tools": self._tools} if self._tools else {}
        if self.thinking is not None:
            fields["chat_template_kwargs"] = {"enable_thinking": self.thinking}
        return fields

    def _tool_results(self, answer: Answer) -> list[Mapping[str, Any]]:
        """Asks the reader what the tools return."""
        assert self.reader is not None
        return [
            {
                "role": "tool",
                "tool_call_id": call["id"],
                "content": self.reader.read(f"{call['function']['name']} returns: "),
            }
            for call in answer.tool_calls
        ]
