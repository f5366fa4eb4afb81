"""Where pagewire keeps what it has fetched, converted and compiled."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """`$PAGEWIRE_HOME`, or `~/.cache/pagewire`. It need not exist."""
    configured = os.environ.get("PAGEWIRE_HOME")
    return Path(configured).expanduser().absolute() if configured else Path.home() / ".cache" / "pagewire"
