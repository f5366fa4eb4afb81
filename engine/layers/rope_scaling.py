"""How rotary frequencies are scaled. No torch: configurations are read before it is imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the model was first trained on.

    Two kinds depend on how long the context is. Here that is the longest context that is served,
    `max_model_len`, for every request alike: keys that are cached must not depend on what comes after them.

    Attributes:
        kind: "linear" divides every frequency by `factor`; "llama3" does so for long wavelengths only and
            blends between them and the short ones (Llama 3.1 model card); "yarn" blends by another rule
            (arXiv:2309.00071); "longrope" has a divisor for each frequency (arXiv:2402.13753); "dynamic"
            raises the base if the context is longer than the original one (NTK-aware scaling), and
            "qwen_dynamic" does so in powers of two, as Qwen 1 does.
        factor: the stretch.
        low_freq_factor, high_freq_factor: bounds of the blend, "llama3" only: wavelengths above original/low
            are stretched in full, below original/high not at all.
        original_max_position: the context that the model was first trained on.
        attention_factor: what cosines and sines are multiplied with.
        beta_fast, beta_slow: bounds of the blend, "yarn" only: frequencies that turn more often than
            beta_fast in the original context are kept, less often than beta_slow stretched in full.
        truncate: whether these bounds are rounded to whole channels, "yarn" only.
        short_factors, long_factors: the divisor of each frequency, "longrope" only; the short ones count if
            the context is no longer than the original one.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
