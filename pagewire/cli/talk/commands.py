"""What can be typed in a conversation besides what is said to the model."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pagewire.base.errors import InvalidRequest, PagewireError
from pagewire.cli.talk import files
from pagewire.cli.talk.reader import Words
from pagewire.cli.talk.settings import DEFAULT, SETTINGS, changed, listed

if TYPE_CHECKING:
    from pagewire.cli.talk.conversation import Conversation

OFF = "off"
_THINK = ("on", "off", "show", "hide")
_KEYS = (
    "Enter sends. Alt-Enter, Ctrl-J or a backslash before Enter begin a new line;",
    'so does Enter between """ and """. Up and Ctrl-R find what was typed before.',
    "Ctrl-C stops an answer, Ctrl-D leaves. A space before / makes it text.",
)


@dataclass(frozen=True, slots=True)
class Command:
    """A command.

    Attributes:
        usage: what follows its name.
        help: one line for people.
        run: does it, with what followed.
        words: what Tab completes after it; None for names of files.
    """

    usage: str
    help: str
    run: Callable[[Conversation, str], None]
    words: Iterable[str] | None = ()


def is_command(text: str) -> bool:
    """Whether a line is a command and nothing for the model."""
    return text.startswith("/")


def run_command(conversation: Conversation, line: str) -> None:
    """Does what the line says, or says what is wrong with it."""
    name, _, argument = line.partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        conversation.say(f"unknown command {name}{hint}: /help lists them")
        return
    try:
        command.run(conversation, argument.strip())
    except PagewireError as error:
        conversation.complain(error.message)


def completions() -> Words:
    """What Tab completes."""
    return {name: command.words for name, command in COMMANDS.items()}


def _system(conversation: Conversation, argument: str) -> None:
    if argument:
        conversation.system = None if argument == OFF else argument
    conversation.say("no system prompt" if conversation.system is None else f"system: {conversation.system}")


def _set(conversation: Conversation, argument: str) -> None:
    if not argument:
        for line in listed(conversation.sampling):
            conversation.say(line)
        return
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    if not value.strip():
        raise InvalidRequest(f"/set {name} needs a value, or '{DEFAULT}' for the model's own")
    conversation.sampling = changed(conversation.sampling, name, value.strip())
    conversation.say(f"{name} is {conversation.sampling.get(name, DEFAULT)}")


def _think(conversation: Conversation, argument: str) -> None:
    if argument not in _THINK:
        raise InvalidRequest(f"/think takes one of {', '.join(_THINK)}")
    if argument in ("on", "off"):
        conversation.thinking = argument == "on"
    else:
        conversation.shows_thoughts = argument == "show"


def _save(conversation: Conversation, argument: str) -> None:
    path = _path("/save", argument)
    whole = conversation.whole()
    files.save(path, files.SavedConversation(whole, conversation.sampling, conversation.model))
    conversation.say(f"saved {len(whole)} messages to {path}")


def _load(conversation: Conversation, argument: str) -> None:
    path = _path("/load", argument)
    saved = files.load(path)
    conversation.restore(saved.messages, saved.sampling)
    conversation.say(f"loaded {len(saved.messages)} messages from {path}")


def _path(command: str, argument: str) -> Path:
    if not argument:
        raise InvalidRequest(f"{command} needs the name of a file")
    return Path(argument).expanduser()


def _stats(conversation: Conversation, _: str) -> None:
    if conversation.last is None:
        conversation.say("nothing was answered yet")
        return
    conversation.say("the last answer")
    for line in conversation.last.lines():
        conversation.say(f"  {line}")
    if conversation.total.answers > 1:
        conversation.say(f"all {conversation.total.answers} answers of this session")
        for line in conversation.total.lines():
            conversation.say(f"  {line}")


def _help(conversation: Conversation, _: str) -> None:
    for name, command in COMMANDS.items():
        conversation.say(f"{name + ' ' + command.usage:<22} {command.help}")
    for line in _KEYS:
        conversation.say(line)


COMMANDS: Mapping[str, Command] = {
    "/system": Command("[TEXT|off]", "show or change what the model is told first", _system, (OFF,)),
    "/set": Command("[NAME VALUE]", "show or change how answers are sampled", _set, SETTINGS),
    "/think": Command("on|off|show|hide", "have the model think, or show that it does", _think, _THINK),
    "/regenerate": Command(
        "", "answer the last question again", lambda conversation, _: conversation.regenerate()
    ),
    "/clear": Command("", "forget the conversation", lambda conversation, _: conversation.clear()),
    "/save": Command("FILE", "write the conversation to a file", _save, None),
    "/load": Command("FILE", "go on with the conversation in a file", _load, None),
    "/stats": Command("", "tokens, time to the first one, tokens/s", _stats),
    "/help": Command("", "this", _help),
    "/exit": Command("", "leave", lambda conversation, _: conversation.leave()),
}
