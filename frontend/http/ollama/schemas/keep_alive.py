"""`keep_alive`: how long a model is to stay loaded. Here it always does; only 0 is told apart."""

from __future__ import annotations

import re

from pagewire.base.errors import InvalidRequest

_DURATION = re.compile(r"[-+]?(\d+(\.\d*)?|(\d+(\.\d*)?(ns|us|µs|ms|s|m|h))+)")  # Go's, or seconds as text


def asks_to_unload(keep_alive: float | str | None) -> bool:
    """Whether a model is to be unloaded at once.

    Raises:
        InvalidRequest: it is no duration.
    """
    if isinstance(keep_alive, str):
        if not _DURATION.fullmatch(keep_alive):
            raise InvalidRequest(
                f'keep_alive is {keep_alive!r}; it must be a number of seconds or a duration such as "5m"',
                param="keep_alive",
            )
        return not any(digit in keep_alive for digit in "123456789")
    return keep_alive == 0
