"""How rotary frequencies are scaled. No torch: configurations are read before it is imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the model was first trained on.

    Attributes:
        kind: "linear" divides every frequency by `factor`; "llama3" does so for long wavelengths only and
            blends between them and the short ones (Llama 3.1 model card).
        factor: the stretch.
        low_freq_factor, high_freq_factor, original_max_position: bounds of the blend, "llama3" only:
            wavelengths above original/low are stretched in full, below original/high not at all.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
