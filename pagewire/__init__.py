"""pagewire: a serving engine for large language models.

from pagewire import LLM, SamplingParams
with LLM("smollm2-135m") as llm:
    print(llm.generate("The capital of France is", SamplingParams(max_tokens=16))[0].outputs[0].text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pagewire.base.version import __version__

if TYPE_CHECKING:
    from pagewire.client import AsyncClient, Client
    from pagewire.offline.llm import LLM
    from pagewire.wire.sampling_params import SamplingParams

__all__ = ["LLM", "AsyncClient", "Client", "SamplingParams", "__version__"]

_LAZY = {
    "LLM": "pagewire.offline.llm",
    "Client": "pagewire.client",
    "AsyncClient": "pagewire.client",
    "SamplingParams": "pagewire.wire.sampling_params",
}


def __getattr__(name: str) -> Any:
    """Imports each name on first use: every process of ours imports this package, and few need them."""
    if name not in _LAZY:
        raise AttributeError(f"module 'pagewire' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
