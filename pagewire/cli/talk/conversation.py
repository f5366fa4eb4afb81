"""The loop of a conversation: reads what is typed, does what it commands, has the rest answered."""

from __future__ import annotations

from pagewire.base.cache_home import cache_home
from pagewire.cli.talk.commands import completions, is_command, run_command
from pagewire.cli.talk.exchange import Exchange
from pagewire.cli.talk.reader import Reader, make_reader

HINT = "/help lists commands; Ctrl-C stops an answer, Ctrl-D leaves"
HISTORY = "chat_history"


class Conversation(Exchange):
    """An exchange between standard input and a model."""

    def run(self) -> None:
        """Reads and answers until /exit or the end of the input."""
        self.reader = reader = make_reader(cache_home() / HISTORY, completions())
        with reader.session():
            self._run(reader)

    def _run(self, reader: Reader) -> None:
        if reader.is_interactive:
            self.say(HINT)
        while not self.has_left:
            try:
                self._take(reader.read())
            except EOFError:
                return
            except KeyboardInterrupt:  # a second one often follows that which stopped an answer
                if not reader.is_interactive:
                    return
                self.say("Ctrl-D leaves")

    def _take(self, said: str) -> None:
        if is_command(said):
            run_command(self, said.strip())
        elif said.strip():
            self.answer(said.strip())
