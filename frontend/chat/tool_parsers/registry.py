"""Finds tool parsers by name: those that come with pagewire, installed plugins, and a plugin file."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path

from frontend.chat.tool_parsers.generic import GenericToolParser
from frontend.chat.tool_parsers.glm import ChatGlm3ToolParser, Glm4ToolParser
from frontend.chat.tool_parsers.harmony import HarmonyToolParser
from frontend.chat.tool_parsers.hermes import HermesToolParser
from frontend.chat.tool_parsers.llama3_json import Llama3JsonToolParser
from frontend.chat.tool_parsers.marked_list import (
    CohereToolParser,
    GraniteToolParser,
    Phi4MiniToolParser,
)
from frontend.chat.tool_parsers.mistral import MistralToolParser
from frontend.chat.tool_parsers.protocol import ToolParser
from frontend.chat.tool_parsers.pythonic import PythonicToolParser
from frontend.chat.tool_parsers.react import ReactToolParser
from pagewire.base.errors import ConfigError

logger = logging.getLogger(__name__)

ENTRY_POINTS = "pagewire.tool_parsers"

_BUILT_IN: tuple[type[ToolParser], ...] = (
    HarmonyToolParser,
    ChatGlm3ToolParser,
    Glm4ToolParser,
    CohereToolParser,
    GraniteToolParser,
    Phi4MiniToolParser,
    HermesToolParser,
    MistralToolParser,
    PythonicToolParser,
    Llama3JsonToolParser,
    ReactToolParser,
    GenericToolParser,
)


def find_tool_parser(name: str, template: str, plugin: Path | None = None) -> type[ToolParser] | None:
    """The parser that the operator chose.

    Args:
        name: a parser's name, "none", or "auto" for the first one that recognizes the template, or else the
            generic one.
        template: the source of the model's chat template.
        plugin: a Python file that defines further parsers.

    Raises:
        ConfigError: there is none of that name, or a plugin cannot be loaded.
    """
    if name == "none":
        return None
    parsers = _parsers(plugin)
    if name != "auto":
        if name not in parsers:
            raise ConfigError(f"tool_call_parser is {name!r}; it must be auto, none, {', '.join(parsers)}")
        return parsers[name]
    found = next((parser for parser in parsers.values() if parser.recognizes(template)), GenericToolParser)
    logger.info("calls of tools are read as %s", found.name)
    return found


def _parsers(plugin: Path | None) -> Mapping[str, type[ToolParser]]:
    """All that there are; a plugin's comes first and may replace another of its name."""
    parsers = [*(_from_file(plugin) if plugin else ()), *_installed(), *_BUILT_IN]
    by_name: dict[str, type[ToolParser]] = {}
    for parser in parsers:
        by_name.setdefault(parser.name, parser)
    return by_name


def _installed() -> list[type[ToolParser]]:
    parsers = []
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            parsers.append(_checked(entry.load(), f"the entry point {entry.name}"))
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"the tool parser {entry.name} cannot be loaded: {error}") from error
    return parsers


def _from_file(path: Path) -> list[type[ToolParser]]:
    """Runs a Python file and takes the parsers that it defines itself."""
    spec = importlib.util.spec_from_file_location("pagewire_tool_parser_plugin", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"tool_parser_plugin {path}: must be a Python file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does wrong
        raise ConfigError(f"tool_parser_plugin {path}: cannot be loaded: {error}") from error
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, ToolParser) and value.__module__ == module.__name__
    ]
    if not found:
        raise ConfigError(f"tool_parser_plugin {path}: defines no subclass of ToolParser")
    return [_checked(value, str(path)) for value in found]


def _checked(value: object, origin: str) -> type[ToolParser]:
    if not (isinstance(value, type) and issubclass(value, ToolParser)):
        raise ConfigError(f"{origin}: {value!r} is no subclass of ToolParser")
    if not isinstance(getattr(value, "name", None), str):
        raise ConfigError(f"{origin}: {value.__name__} has no name")
    return value
