"""pagewire: a serving engine for large language models.

from pagewire import LLM, SamplingParams
with LLM("smollm2-135m") as llm:
    print(llm.generate("The capital of France is", SamplingParams(max_tokens=16))[0].outputs[0].text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pagewire.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pagewire.client import AsyncClient, Client
    from pagewire.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncClient", "Client", "SamplingParams", "__version__"]

_LAZY = {"LLM": "pagewire.llm", "Client": "pagewire.client", "AsyncClient": "pagewire.client"}


def __getattr__(name: str) -> Any:
    """Imports the heavier names on first use, so that a process pays only for what it needs."""
    if name not in _LAZY:
        raise AttributeError(f"module 'pagewire' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
