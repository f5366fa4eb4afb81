"""Conversations in files: `/save` and `/load`.

A file is a JSON object with OpenAI's "messages", the "model" and its "sampling" parameters. A bare list of
messages can be loaded too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pagewire.base.errors import InvalidRequest
from pagewire.wire.chat_messages import to_chat_messages
from pagewire.wire.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class SavedConversation:
    """What a file holds. `messages` begins with the system's, where there is one."""

    messages: Sequence[Mapping[str, Any]]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""


def save(path: Path, conversation: SavedConversation) -> None:
    """Writes the file, whole or not at all. One that holds something else than a conversation is not touched.

    Raises:
        InvalidRequest: it cannot be written, or holds something else.
    """
    if path.exists():
        try:
            load(path)
        except InvalidRequest:
            raise InvalidRequest(f"{path} exists and is no conversation; name another file") from None
    document = {
        "model": conversation.model,
        "sampling": dict(conversation.sampling),
        "messages": list(conversation.messages),
    }
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(document, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be written: {error.strerror}") from error


def load(path: Path) -> SavedConversation:
    """Reads the file.

    Raises:
        InvalidRequest: it cannot be read, or holds no conversation.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{path}: is not JSON; /save writes what can be loaded") from None
    if isinstance(document, list):
        document = {"messages": document}
    messages = document.get("messages") if isinstance(document, dict) else None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InvalidRequest(f'{path}: has no list of "messages"; /save writes what can be loaded')
    sampling = document.get("sampling") or {}
    try:
        to_chat_messages(messages)
        SamplingParams(**sampling)
    except (InvalidRequest, TypeError) as error:
        raise InvalidRequest(f"{path}: {error}") from None
    return SavedConversation(messages, sampling, str(document.get("model") or ""))
