"""The settings of speculative decoding: what proposes draft tokens, and how many."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

from pagewire.base.errors import ConfigError
from pagewire.base.settings import require

METHODS = ("ngram", "draft_model", "eagle3", "test")
"""`test` accepts drafts at random, whatever the model says: its text means nothing. For measurements."""
NOT_BUILT = ("draft_model", "eagle3")
MAX_DRAFTS = 16
_MAX_NGRAM = 32
_DEFAULT_DRAFTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationSettings:
    """How draft tokens are proposed.

    Attributes:
        method: what proposes them: ngram copies what followed the same tokens earlier in the request (or in
            its prediction); draft_model asks a small model; eagle3 a head on the model's own hidden states.
        model: the small model or the head; None for n-grams.
        num_speculative_tokens: draft tokens of a request in a step, at most.
        prompt_lookup_min, prompt_lookup_max: of how many tokens an n-gram is that must be found again.
        acceptance: with the method test, the probability that a draft is accepted.
    """

    method: str = "ngram"
    model: str | None = None
    num_speculative_tokens: int = _DEFAULT_DRAFTS
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 5
    acceptance: float = 0.7

    def __post_init__(self) -> None:
        """Raises ConfigError for a value out of its range."""
        name = "speculative_config"
        require(self.method in METHODS, f"{name}.method", self.method, f"one of {', '.join(METHODS)}")
        if self.method in NOT_BUILT:
            raise ConfigError(
                f"speculative_config: the method {self.method} is not built yet; use ngram", param=name
            )
        count = self.num_speculative_tokens
        _require_int(f"{name}.num_speculative_tokens", count, 1, MAX_DRAFTS)
        _require_int(f"{name}.prompt_lookup_max", self.prompt_lookup_max, 1, _MAX_NGRAM)
        _require_int(f"{name}.prompt_lookup_min", self.prompt_lookup_min, 1, self.prompt_lookup_max)
        has_model = self.model is not None
        require(
            has_model == (self.method in NOT_BUILT),
            f"{name}.model",
            self.model,
            "a model for draft_model and eagle3, and absent for the others",
        )
        require(0 <= self.acceptance <= 1, f"{name}.acceptance", self.acceptance, "0 to 1")


def read_settings(
    config: str | None, model: str | None, num_speculative_tokens: int | None
) -> SpeculationSettings | None:
    """The settings that three options give; None if none of them is given.

    Args:
        config: a JSON object with fields of SpeculationSettings.
        model: a model that proposes, or "[ngram]" or "ngram"; short for the object's `model` and `method`.
        num_speculative_tokens: short for the object's.

    Raises:
        ConfigError: they contradict each other, or a value is wrong.
    """
    if config is None and model is None and num_speculative_tokens is None:
        return None
    values = {} if config is None else _object(config)
    for name, value in (("model", model), ("num_speculative_tokens", num_speculative_tokens)):
        if value is None:
            continue
        if name in values and values[name] != value:
            raise ConfigError(
                f"speculative_config has {name} {values[name]!r}, the option {value!r}; give one of them",
                param="speculative_config",
            )
        values[name] = value
    if values.get("model") in ("ngram", "[ngram]"):
        values["method"], values["model"] = "ngram", None
    if values.get("model") is not None:
        values.setdefault("method", "draft_model")
    return SpeculationSettings(**values)


def _object(text: str) -> dict[str, Any]:
    known = [field.name for field in fields(SpeculationSettings)]
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"speculative_config is no JSON: {error}", param="speculative_config") from None
    if not isinstance(values, dict) or not set(values) <= set(known):
        raise ConfigError(
            f"speculative_config is {text}; it must be a JSON object with some of {', '.join(known)}",
            param="speculative_config",
        )
    return values


def _require_int(name: str, value: object, least: int, most: int) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    require(is_int and least <= value <= most, name, value, f"a whole number from {least} to {most}")  # type: ignore[operator]
