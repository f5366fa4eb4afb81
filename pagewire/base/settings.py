"""Checks that configuration classes make on their own values."""

from __future__ import annotations

from typing import Any

from pagewire.base.errors import ConfigError


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raises ConfigError, saying what is allowed, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{name} is {value!r}; it must be {allowed}", param=name)


def require_positive(config: Any, *names: str) -> None:
    """Raises ConfigError unless each of these fields is None or at least 1."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value >= 1, name, value, "at least 1")
