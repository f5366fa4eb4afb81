"""GGUF files that are split into parts, such as model-00001-of-00003.gguf. The names say which belong
together."""

from __future__ import annotations

import re
from pathlib import Path

from pagewire.base.errors import ConfigError

_PART = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})(?P<suffix>\.(?i:gguf))")
_SHOWN = 3


def part_names(name: str) -> list[str]:
    """The names of all parts of the model that a file is a part of, in order; the file's alone where it is
    whole. What comes before the parts' numbers, folders too, stays as it is.

    Raises:
        ConfigError: the name's numbers are not those of a part.
    """
    match = _PART.fullmatch(name)
    if match is None:
        return [name]
    number, count = int(match["number"]), int(match["count"])
    if not 1 <= number <= count:
        raise ConfigError(f"{name}: is part {number} of {count} by its name; parts are numbered from 1")
    return [f"{match['stem']}-{index:05}-of-{count:05}{match['suffix']}" for index in range(1, count + 1)]


def missing_parts(name: str, missing: list[str], count: int) -> ConfigError:
    """What to say where parts of a model are not there.

    Args:
        name: of a part that is there.
        missing: the names of those that are not.
        count: of how many parts.
    """
    more = ", ..." if len(missing) > _SHOWN else ""
    return ConfigError(
        f"{name}: {len(missing)} of its model's {count} parts are missing: "
        f"{', '.join(missing[:_SHOWN])}{more}"
    )


def gguf_parts(path: Path) -> list[Path]:
    """All parts of the model that a file is a part of, in order; the file alone where it is whole.

    Raises:
        ConfigError: a part is missing, or the name's numbers are not those of a part.
    """
    parts = [path.with_name(name) for name in part_names(path.name)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing and len(parts) > 1:
        raise missing_parts(str(path), missing, len(parts))
    return parts
