"""A configuration as the arguments of the process that gets it, and back.

For processes that start others. No library for command lines is imported: it would take as long as the rest
of a scheduler's start. Options for people, with help, are made in options.py.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from pagewire.base.errors import ConfigError

Config = TypeVar("Config")

# A repeatable option is named after one of its values.
SINGULAR = {
    "api_keys": "api_key",
    "admin_api_keys": "admin_api_key",
    "served_model_names": "served_model_name",
}
# Options that have another name too, which other engines' users know.
SHORT = {
    "tensor_parallel_size": "-tp",
    "pipeline_parallel_size": "-pp",
    "scheduler": "--schedulers",
}
# Options that may come from the environment. Keys do, so that they need not appear in lists of processes.
ENVIRONMENT = {"api_keys": "PAGEWIRE_API_KEY", "admin_api_keys": "PAGEWIRE_ADMIN_API_KEY"}


def arguments(config: Any) -> list[str]:
    """The arguments that give a command the same configuration: MODEL first, then what differs from the
    defaults. Fields that travel in the environment are left out; see `environment`."""
    positional: list[str] = []
    options: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "model":
            positional.append(value)
        elif field.name not in ENVIRONMENT and value != field.default:
            options += _option(field.name, value)
    return [*positional, *options]


def environment(config: Any) -> dict[str, str]:
    """The environment variables that complete `arguments`. Empty ones too, lest a process inherit others."""
    return {
        variable: " ".join(getattr(config, name))
        for name, variable in ENVIRONMENT.items()
        if hasattr(config, name)
    }


def read(config: type[Config], words: Sequence[str]) -> Config:
    """The configuration of which `words` are the `arguments`, and this process has the `environment`.

    Raises:
        ConfigError: they are not what `arguments` makes, or the class refuses a value.
    """
    hints = typing.get_type_hints(config)
    flags = {flag(name, is_on): (name, is_on) for name in hints for is_on in (True, False)}
    flags |= {SHORT[name]: (name, True) for name in hints if name in SHORT}
    values: dict[str, Any] = {
        name: tuple(os.environ[variable].split())
        for name, variable in ENVIRONMENT.items()
        if name in hints and os.environ.get(variable)
    }
    rest = iter(words)
    for word in rest:
        if word not in flags and "model" in hints and "model" not in values:
            values["model"] = word
            continue
        try:
            name, is_on = flags[word]
            hint = hints[name]
            if hint is bool:
                values[name] = is_on
            elif typing.get_origin(hint) is tuple:
                values[name] = (*values.get(name, ()), _type(hint)(next(rest)))
            else:
                values[name] = _type(hint)(next(rest))
        except (KeyError, StopIteration, ValueError) as error:
            raise ConfigError(f"{word}: no such option, or no value for it ({error})") from None
    try:
        return config(**values)
    except TypeError as error:
        raise ConfigError(f"an option is missing: {error}") from None


def _type(hint: Any) -> Any:
    """What makes one value of a string: of `int | None` int, of `tuple[str, ...]` str."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union, tuple):
        return next(each for each in typing.get_args(hint) if each not in (types.NoneType, ...))
    return hint


def _option(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag(name, value)]
    if isinstance(value, tuple):
        return [part for item in value for part in (flag(name), str(item))]
    return [flag(name), str(value)]


def flag(name: str, value: bool = True) -> str:
    """The option of a field; with false, the one that turns it off."""
    return f"--{'' if value else 'no-'}{SINGULAR.get(name, name).replace('_', '-')}"
