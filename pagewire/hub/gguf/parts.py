"""GGUF files that are split into parts, such as model-00001-of-00003.gguf. The names say which belong
together."""

from __future__ import annotations

import re
from pathlib import Path

from pagewire.base.errors import ConfigError

_PART = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")
_SHOWN = 3


def gguf_parts(path: Path) -> list[Path]:
    """All parts of the model that a file is a part of, in order; the file alone where it is whole.

    Raises:
        ConfigError: a part is missing, or the name's numbers are not those of a part.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    number, count = int(match["number"]), int(match["count"])
    if not 1 <= number <= count:
        raise ConfigError(f"{path}: is part {number} of {count} by its name; parts are numbered from 1")
    parts = [
        path.with_name(f"{match['stem']}-{index:05}-of-{count:05}.gguf") for index in range(1, count + 1)
    ]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        more = ", ..." if len(missing) > _SHOWN else ""
        raise ConfigError(
            f"{path}: {len(missing)} of its model's {count} parts are missing: "
            f"{', '.join(missing[:_SHOWN])}{more}"
        )
    return parts
