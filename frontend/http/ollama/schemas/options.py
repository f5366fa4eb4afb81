"""`options`: how to sample, and hints about the machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

from frontend.http.body import Body

DEFAULTS: Mapping[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
"""Ollama's own, by SamplingParams field; the model's go before them, as a Modelfile's parameters do. Its
repeat_penalty of 1.1 is not among them: it looks 64 tokens back, ours at everything."""


def _whole(value: Any) -> Any:
    """Some languages have only one kind of number, and write 40 as 40.0, which Ollama takes."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Whole = Annotated[int, BeforeValidator(_whole)]


class OllamaOptions(Body):
    """Ollama's `options`. Those in the second part are taken and change nothing: what they are about is the
    engine's to decide, or newer versions of Ollama have dropped it."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: _Whole | None = None
    min_p: float | None = None
    seed: _Whole | None = None
    num_predict: _Whole | None = None
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    num_ctx: _Whole | None = None
    num_keep: _Whole | None = None
    num_batch: _Whole | None = None
    num_gpu: _Whole | None = None
    main_gpu: _Whole | None = None
    num_thread: _Whole | None = None
    num_gqa: _Whole | None = None
    numa: bool | None = None
    low_vram: bool | None = None
    f16_kv: bool | None = None
    logits_all: bool | None = None
    vocab_only: bool | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    embedding_only: bool | None = None
    rope_frequency_base: float | None = None
    rope_frequency_scale: float | None = None
    repeat_last_n: _Whole | None = None
    typical_p: float | None = None
    tfs_z: float | None = None
    mirostat: _Whole | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    penalize_newline: bool | None = None

    def sampling_given(self) -> dict[str, Any]:
        """The sampling parameters that were set, by SamplingParams field."""
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "seed": None if self.seed is not None and self.seed < 0 else self.seed,
            "stop": self.stop,
            "repetition_penalty": self.repeat_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if self.top_p == 0:  # the likeliest token alone
            given |= {"top_p": 1.0, "top_k": 1}
        if self.num_predict is not None:  # -1 is no limit, -2 the rest of the context, which is the same here
            given["max_tokens"] = self.num_predict if self.num_predict > 0 else None
        return given
