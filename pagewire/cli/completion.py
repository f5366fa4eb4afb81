"""What a shell completes for arguments of ours, besides options and names of commands."""

from __future__ import annotations

from collections.abc import Iterator

from pagewire.hub.listing import list_models
from pagewire.hub.names.aliases import ALIASES
from pagewire.hub.names.model_types import MODEL_TYPES
from pagewire.hub.names.reference import HUBS


def complete_model(incomplete: str) -> Iterator[tuple[str, str]]:
    """Models by name with what they are: aliases, and what is in the cache. For what matches none of them the
    shell completes files."""
    names = {alias.name: alias.description for alias in ALIASES.values()}
    names |= {entry.name: f"{entry.size / 1e6:,.0f} MB, {entry.source}" for entry in list_models()}
    if incomplete:  # there are many of them
        names |= {name: each.huggingface for name, each in MODEL_TYPES.items() if name not in names}
    return ((name, what) for name, what in names.items() if name.startswith(incomplete))


def complete_hub(incomplete: str) -> Iterator[str]:
    """Hubs by name."""
    return (hub for hub in HUBS if hub.startswith(incomplete))
