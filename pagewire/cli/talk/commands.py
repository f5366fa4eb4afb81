"""What can be typed in a conversation besides what is said to the model."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pagewire.base.errors import InvalidRequest, PagewireError
from pagewire.cli.talk import files
from pagewire.cli.talk.exchange import Exchange
from pagewire.cli.talk.reader import Words
from pagewire.cli.talk.settings import DEFAULT, SETTINGS, changed, listed

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
    run: Callable[[Exchange, str], None]
    words: Iterable[str] | None = ()


def is_command(text: str) -> bool:
    """Whether a line is a command and nothing for the model."""
    return text.startswith("/")


def run_command(exchange: Exchange, line: str) -> None:
    """Does what the line says, or says what is wrong with it."""
    name, _, argument = line.partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        begun = [each for each in COMMANDS if each.startswith(name)]
        close = begun or difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        exchange.say(f"unknown command {name}{hint}: /help lists them")
        return
    try:
        command.run(exchange, argument.strip())
    except PagewireError as error:
        exchange.complain(error.message)


def completions() -> Words:
    """What Tab completes."""
    return {name: command.words for name, command in COMMANDS.items()}


def _system(exchange: Exchange, argument: str) -> None:
    if argument:
        exchange.system = None if argument == OFF else argument
    exchange.say("no system prompt" if exchange.system is None else f"system: {exchange.system}")


def _set(exchange: Exchange, argument: str) -> None:
    if not argument:
        for line in listed(exchange.sampling):
            exchange.say(line)
        return
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    if not value.strip():
        raise InvalidRequest(f"/set {name} needs a value, or '{DEFAULT}' for the model's own")
    exchange.sampling = changed(exchange.sampling, name, value.strip())
    exchange.say(f"{name} is {exchange.sampling.get(name, DEFAULT)}")


def _think(exchange: Exchange, argument: str) -> None:
    if argument not in _THINK:
        raise InvalidRequest(f"/think takes one of {', '.join(_THINK)}")
    if argument in ("on", "off"):
        exchange.thinking = argument == "on"
    else:
        exchange.shows_thoughts = argument == "show"


def _save(exchange: Exchange, argument: str) -> None:
    path = _path("/save", argument)
    whole = exchange.whole()
    files.save(path, files.SavedConversation(whole, exchange.sampling, exchange.model))
    exchange.say(f"saved {len(whole)} messages to {path}")


def _load(exchange: Exchange, argument: str) -> None:
    path = _path("/load", argument)
    saved = files.load(path)
    exchange.restore(saved.messages, saved.sampling)
    exchange.say(f"loaded {len(saved.messages)} messages from {path}")


def _path(command: str, argument: str) -> Path:
    if not argument:
        raise InvalidRequest(f"{command} needs the name of a file")
    return Path(argument).expanduser()


def _stats(exchange: Exchange, _: str) -> None:
    if exchange.last is None:
        exchange.say("nothing was answered yet")
        return
    exchange.say("the last answer")
    for line in exchange.last.lines():
        exchange.say(f"  {line}")
    if exchange.total.answers > 1:
        exchange.say(f"all {exchange.total.answers} answers of this session")
        for line in exchange.total.lines():
            exchange.say(f"  {line}")


def _help(exchange: Exchange, _: str) -> None:
    for name, command in COMMANDS.items():
        exchange.say(f"{name + ' ' + command.usage:<22} {command.help}")
    for line in _KEYS:
        exchange.say(line)


COMMANDS: Mapping[str, Command] = {
    "/system": Command("[TEXT|off]", "show or change what the model is told first", _system, (OFF,)),
    "/set": Command("[NAME VALUE]", "show or change how answers are sampled", _set, SETTINGS),
    "/think": Command("on|off|show|hide", "have the model think, or show that it does", _think, _THINK),
    "/regenerate": Command("", "answer the last question again", lambda exchange, _: exchange.regenerate()),
    "/clear": Command("", "forget the conversation", lambda exchange, _: exchange.clear()),
    "/save": Command("FILE", "write the conversation to a file", _save, None),
    "/load": Command("FILE", "go on with the conversation in a file", _load, None),
    "/stats": Command("", "tokens, time to the first one, tokens/s", _stats),
    "/help": Command("", "this", _help),
    "/exit": Command("", "leave", lambda exchange, _: exchange.leave()),
    "/bye": Command("", "leave, as with Ollama", lambda exchange, _: exchange.leave()),
}
