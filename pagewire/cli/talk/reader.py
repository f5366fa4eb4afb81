"""Where the questions come from: a terminal, with editing and a history, or anything else, line by line."""

from __future__ import annotations

import os
import sys
import termios
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import History

Words = Mapping[str, Iterable[str] | None]
"""What Tab completes: commands, each with the words that may follow it, or None where a file does."""

QUOTES = '"""'
"""Around a text of several lines."""

PROMPT = "> "
_INPUT_FLAGS, _LOCAL_FLAGS = 0, 3  # in what tcgetattr returns


class Reader(Protocol):
    """Reads what is said.

    Attributes:
        is_interactive: whether a person is there to answer.
    """

    is_interactive: bool

    def session(self) -> AbstractContextManager[None]:
        """Around a whole conversation."""
        ...

    def read(self, prompt: str = PROMPT) -> str:
        """What is said next: a line, or several between quotes of three.

        Raises:
            EOFError: there is no more.
            KeyboardInterrupt: Ctrl-C.
        """
        ...


def make_reader(history: Path, words: Words) -> Reader:
    """The reader for this process's standard input.

    Args:
        history: the file that keeps what was typed.
        words: what Tab completes.
    """
    if sys.stdin.isatty() and sys.stdout.isatty():
        return TerminalReader(history, words)
    return LineReader()


class LineReader:
    """Reads standard input line by line, without a word. Bytes that are no UTF-8 become U+FFFD."""

    is_interactive = False

    def __init__(self) -> None:
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")

    def session(self) -> AbstractContextManager[None]:
        """See Reader."""
        return nullcontext()

    def read(self, prompt: str = PROMPT) -> str:
        """See Reader."""
        text = _line()
        while is_open(text):
            try:
                text += f"\n{_line()}"
            except EOFError:
                break
        return unquoted(text)


class TerminalReader:
    """Edits lines at a terminal: Enter sends; Alt-Enter, Ctrl-J or a backslash before Enter begin a new line,
    and what is pasted keeps its own. Up and down walk through the history, Ctrl-R searches it."""

    is_interactive = True

    def __init__(self, history: Path, words: Words) -> None:
        from prompt_toolkit import PromptSession

        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            history=_history(history),
            completer=_completer(words),
            complete_while_typing=False,
            key_bindings=_key_bindings(),
            prompt_continuation="  ",
        )

    @contextmanager
    def session(self) -> Iterator[None]:
        """See Reader. What is typed while an answer comes waits, key by key, for the next question: it is not
        echoed in the middle of the answer, and Enter stays Enter."""
        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
        during = termios.tcgetattr(terminal)
        during[_INPUT_FLAGS] &= ~termios.ICRNL
        during[_LOCAL_FLAGS] &= ~(termios.ECHO | termios.ICANON)
        termios.tcsetattr(terminal, termios.TCSANOW, during)
        try:
            yield
        finally:
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)

    def read(self, prompt: str = PROMPT) -> str:
        """See Reader."""
        return unquoted(self._session.prompt(prompt))


def is_open(text: str) -> bool:
    """Whether a text begins with three quotes that it has not closed."""
    opening = text.lstrip()
    return opening.startswith(QUOTES) and not (
        len(opening.rstrip()) >= 2 * len(QUOTES) and opening.rstrip().endswith(QUOTES)
    )


def unquoted(text: str) -> str:
    """The text without the quotes around it."""
    stripped = text.strip()
    if not stripped.startswith(QUOTES):
        return text
    return stripped.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")


def _line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def _history(path: Path) -> History:
    """The file, which only its user can read; what is typed in this session alone where it cannot be
    written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600))
    except OSError as error:
        print(f"{path}: cannot be written ({error.strerror}); nothing typed is kept", file=sys.stderr)
        return InMemoryHistory()
    return FileHistory(str(path))


def _completer(words: Words) -> Completer:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    files = PathCompleter(expanduser=True)

    class Commands(Completer):
        def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
            command, space, rest = document.text_before_cursor.partition(" ")
            following = words.get(command, ())
            if not space:
                names = (each for each in words if each.startswith(command))
                yield from (
                    Completion(each if words[each] == () else f"{each} ", -len(command)) for each in names
                )
            elif following is None:
                yield from files.get_completions(Document(rest), event)
            else:
                yield from (Completion(each, -len(rest)) for each in following if each.startswith(rest))

    return Commands()


def _key_bindings() -> Any:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    @bindings.add("c-j")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings
