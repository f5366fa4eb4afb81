"""Which architectures are implemented, and by which class. Importing this module imports no model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from pagewire.errors import ConfigError

if TYPE_CHECKING:
    from engine.models.base import CausalLM

# The name in config.json's `architectures` -> "module:class".
ARCHITECTURES = {
    "LlamaForCausalLM": "engine.models.llama:LlamaForCausalLM",
    "MistralForCausalLM": "engine.models.llama:LlamaForCausalLM",
    "Qwen3ForCausalLM": "engine.models.llama:LlamaForCausalLM",
}


def require_supported(architecture: str, source: str) -> None:
    """Raises ConfigError, listing what is supported, unless the architecture is implemented."""
    if architecture not in ARCHITECTURES:
        supported = ", ".join(sorted(ARCHITECTURES))
        raise ConfigError(f"{source}: architecture {architecture!r} is not supported; supported: {supported}")


def model_class(architecture: str) -> type[CausalLM]:
    """The class that implements a supported architecture."""
    module, name = ARCHITECTURES[architecture].split(":")
    cls: type[CausalLM] = getattr(import_module(module), name)
    return cls
