"""OpenAI's fields that change no answer here: hints, which are taken and not used, and what is not served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from frontend.http.body import Body

UNSERVED: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (),
    "prediction": (),
    "reasoning_effort": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""See `Body.unserved`. What an endpoint does serve is a field of its body, to which this does not apply."""


class Hints(Body):
    """What asks for nothing that an answer shows: notes for a server that stores answers, and wishes about
    prices, caches and storage, which have no meaning here."""

    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"] | None = None
    store: bool | None = None


class CacheHints(Body):
    """Marks of what a cache should keep, on messages, parts and tools. Here every prefix is cached that there
    is room for."""

    cache_control: dict[str, Any] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None
