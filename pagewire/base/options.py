"""Command-line options made from the configuration dataclasses.

A field of WorkerConfig, SchedulerConfig or FrontendConfig is the one place that defines an option: its
name, type, default and (from the class's docstring) help. `with_options` gives a command the options of
some classes. The way back, from a configuration to a command line, is in command_line.py.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from pagewire.base.command_line import ENVIRONMENT, SHORT, Config, flag


def with_options(*configs: type, without: Sequence[str] = ()) -> Callable[[Callable[..., None]], Any]:
    """Decorates a typer command: adds an option for every field of `configs` that it does not name itself.

    The command receives them as keyword arguments. A field `model` becomes the positional MODEL. Fields
    that several classes share appear once.

    Args:
        without: fields that get no option, because the command decides them.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter.replace(kind=parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        names = {parameter.name for parameter in own}.union(without)
        generated: dict[str, inspect.Parameter] = {}
        for config in configs:
            for name, parameter in _parameters(config).items():
                if name not in names:
                    generated.setdefault(name, parameter)

        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            command(**values)

        signature = inspect.Signature([*own, *generated.values()])
        wrapper.__signature__ = signature  # type: ignore[attr-defined]
        wrapper.__annotations__ = {
            name: parameter.annotation for name, parameter in signature.parameters.items()
        }
        return wrapper

    return decorate


def examples(*lines: str) -> str:
    """The end of a command's help: what to type, line by line as it stands here."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def build(config: type[Config], values: dict[str, Any]) -> Config:
    """A configuration from option values; values of other classes' options are left out.

    Raises:
        ConfigError: the class refuses a value.
    """
    chosen = {field.name: values[field.name] for field in _fields(config) if field.name in values}
    for name, value in chosen.items():
        if isinstance(value, list):
            chosen[name] = tuple(value)
    return config(**chosen)


def _parameters(config: type) -> dict[str, inspect.Parameter]:
    hints = typing.get_type_hints(config)
    helps = _help(config)
    parameters = {}
    for field in _fields(config):
        required = field.default is dataclasses.MISSING
        kind = _option_type(hints[field.name])
        default = inspect.Parameter.empty if required else field.default
        info: Any
        if field.name == "model":
            info = typer.Argument(metavar="MODEL", help=helps.get(field.name))
        else:
            name = f"{flag(field.name)}/{flag(field.name, False)}" if kind is bool else flag(field.name)
            info = typer.Option(
                name,
                *([SHORT[field.name]] if field.name in SHORT else []),
                help=helps.get(field.name),
                envvar=ENVIRONMENT.get(field.name),
                show_envvar=field.name in ENVIRONMENT,
            )
        parameters[field.name] = inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=list(default) if isinstance(default, tuple) else default,
            annotation=Annotated[kind, info],
        )
    return parameters


def _option_type(hint: Any) -> Any:
    """The type typer understands: `tuple[str, ...]` is a list of repeated options."""
    if typing.get_origin(hint) is tuple:
        return list[typing.get_args(hint)[0]]  # type: ignore[misc]
    return hint


def _help(config: type) -> dict[str, str]:
    """Help by field name, from the docstring's section of attributes."""
    section = inspect.getdoc(config) or ""
    entries = re.findall(
        r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section.partition("Attributes:\n")[2], re.MULTILINE
    )
    return {name: _sentence(re.sub(r"\s+", " ", text)) for name, text in entries}


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _fields(config: type) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(config)
