"""Sampling parameters that can be changed in the middle of a conversation: `/set`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pagewire.base.errors import InvalidRequest
from pagewire.wire.sampling_params import SamplingParams

DEFAULT = "default"
"""The word that gives a parameter back to the server, that is to the model's own default."""


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InvalidRequest(f"'{text}' is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidRequest(f"'{text}' is not a number") from None


def _texts(text: str) -> list[str]:
    """One text, or a JSON list of them."""
    if not text.startswith("["):
        return [text]
    try:
        texts = json.loads(text)
    except ValueError:
        raise InvalidRequest(f"{text} is not a JSON list of texts") from None
    if not all(isinstance(each, str) for each in texts):
        raise InvalidRequest(f"{text} is not a JSON list of texts")
    return list(texts)


@dataclass(frozen=True, slots=True)
class Setting:
    """A parameter: how its value is read, and one line for people."""

    read: Callable[[str], Any]
    help: str


SETTINGS: Mapping[str, Setting] = {
    "temperature": Setting(_number, "how freely tokens are chosen; 0 takes the likeliest"),
    "top_p": Setting(_number, "the likeliest tokens that together have this probability"),
    "top_k": Setting(_integer, "this many of the likeliest tokens"),
    "min_p": Setting(_number, "tokens at least this share as likely as the likeliest"),
    "repetition_penalty": Setting(_number, "above 1: tokens that were there already are less likely"),
    "presence_penalty": Setting(_number, "-2 to 2: the same, once for a token of the answer"),
    "frequency_penalty": Setting(_number, "-2 to 2: the same, for every time it is there"),
    "seed": Setting(_integer, "makes answers reproducible"),
    "max_tokens": Setting(_integer, "the longest answer"),
    "min_tokens": Setting(_integer, "the shortest answer"),
    "stop": Setting(_texts, 'a text that ends the answer, or a JSON list: ["a", "b"]'),
}


def changed(sampling: Mapping[str, Any], name: str, value: str) -> dict[str, Any]:
    """The parameters with one of them changed, or given back to the model's default.

    Raises:
        InvalidRequest: there is no such parameter, or it cannot have this value.
    """
    if name not in SETTINGS:
        close = difflib.get_close_matches(name, SETTINGS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise InvalidRequest(f"there is no setting '{name}'{hint}; there are {', '.join(SETTINGS)}")
    if value == DEFAULT:
        return {key: each for key, each in sampling.items() if key != name}
    try:
        new = {**sampling, name: SETTINGS[name].read(value)}
    except InvalidRequest as error:
        raise InvalidRequest(f"{name}: {error.message}") from None
    SamplingParams(**new)
    return new


def listed(sampling: Mapping[str, Any]) -> list[str]:
    """A line for each parameter, with its value."""
    return [
        f"{name:<19} {json.dumps(sampling[name]) if name in sampling else DEFAULT:<9} {setting.help}"
        for name, setting in SETTINGS.items()
    ]
