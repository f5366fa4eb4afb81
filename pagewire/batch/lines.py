"""The lines of an input file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pagewire.base.errors import ConfigError, InvalidRequest


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not blank.

    Attributes:
        number: its place in the file, from 1, as editors count.
        content: without the end of the line.
    """

    number: int
    content: bytes

    @property
    def key(self) -> str:
        """Names the line and what is in it."""
        digest = blake2b(self.content, digest_size=8, person=b"batch line").hexdigest()
        return f"{self.number:06d}_{digest}"

    def fields(self) -> dict[str, Any]:
        """The JSON object that it is.

        Raises:
            InvalidRequest: it is something else.
        """
        try:
            value = json.loads(self.content)
        except (ValueError, RecursionError) as error:
            why = "it is not UTF-8, or nested too deeply"
            if isinstance(error, json.JSONDecodeError):
                why = f"{error.msg} at column {error.colno}"
            raise InvalidRequest(f"line {self.number} is not JSON: {why}") from None
        if not isinstance(value, dict):
            raise InvalidRequest(f"line {self.number} is JSON, but not an object {{...}}")
        return value


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a file, blank ones left out.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, content in enumerate(file, 1):
                if content := content.strip():
                    yield Line(number, content)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
