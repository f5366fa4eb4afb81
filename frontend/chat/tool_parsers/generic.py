"""Calls of models that were not made for tools. `frontend.chat.generic_tools` tells them how to call."""

from __future__ import annotations

from frontend.chat.tool_parsers.hermes import HermesToolParser


class GenericToolParser(HermesToolParser):
    """The format of Hermes, which is the most common, and easy to describe."""

    name = "generic"
    is_generic = True

    @classmethod
    def recognizes(cls, template: str) -> bool:
        return False
