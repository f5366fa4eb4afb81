"""How a completion is sampled and when it stops, in one type for every entry point."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pagewire.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LENGTH = 1024
MAX_TOKEN_LIST = 1024
INT32_MAX = 2**31 - 1
INT64_RANGE = range(-(2**63), 2**63)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters, validated on construction. The meaning and range of each field is that of
    the message of the same name in protos/pagewire/inference/v1/inference.proto.

    Raises:
        InvalidRequest: a value is out of its range; `param` names the field.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] = ()
    n: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        _require(0 <= self.temperature < math.inf, "temperature", self.temperature, "at least 0 and finite")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "greater than 0 and at most 1")
        _require(
            -1 <= self.top_k <= INT32_MAX,
            "top_k",
            self.top_k,
            f"at least 1 and at most {INT32_MAX}, or 0 or -1 for no limit",
        )
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        _require(
            0.01 <= self.repetition_penalty <= 100,
            "repetition_penalty",
            self.repetition_penalty,
            "between 0.01 and 100",
        )
        _require(
            -2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "between -2 and 2"
        )
        _require(
            -2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "between -2 and 2"
        )
        _require(self.seed is None or self.seed in INT64_RANGE, "seed", self.seed, "a signed 64-bit integer")
        _require(
            self.max_tokens is None or 1 <= self.max_tokens <= INT32_MAX,
            "max_tokens",
            self.max_tokens,
            f"at least 1 and at most {INT32_MAX}",
        )
        _require(
            0 <= self.min_tokens <= INT32_MAX,
            "min_tokens",
            self.min_tokens,
            f"at least 0 and at most {INT32_MAX}",
        )
        _require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            f"at most max_tokens ({self.max_tokens})",
        )
        _require(self.n == 1, "n", self.n, "1: this server returns one completion a request")
        _require(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            "logprobs",
            self.logprobs,
            f"between 0 and {MAX_LOGPROBS}",
        )
        self._check_lists()

    def _check_lists(self) -> None:
        _require(
            len(self.stop) <= MAX_STOP_STRINGS,
            "stop",
            f"a list of {len(self.stop)}",
            f"at most {MAX_STOP_STRINGS} strings",
        )
        for text in self.stop:
            _require(
                0 < len(text) <= MAX_STOP_STRING_LENGTH,
                "stop",
                f"a string of {len(text)} characters",
                f"strings of 1 to {MAX_STOP_STRING_LENGTH} characters",
            )
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            size = len(getattr(self, name))
            _require(size <= MAX_TOKEN_LIST, name, f"{size} entries", f"at most {MAX_TOKEN_LIST} entries")
        for token_id, bias in self.logit_bias.items():
            _require(
                -100 <= bias <= 100, "logit_bias", f"{bias} for token {token_id}", "between -100 and 100"
            )

    def check_token_ids(self, vocab_size: int) -> None:
        """Checks every token id named here against the model's vocabulary.

        Raises:
            InvalidRequest: an id is negative or not below `vocab_size`.
        """
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            for token_id in getattr(self, name):
                _require(
                    0 <= token_id < vocab_size,
                    name,
                    f"token id {token_id}",
                    f"between 0 and {vocab_size - 1}",
                )


def _require(condition: bool, param: str, value: object, allowed: str) -> None:
    """Raises unless the condition holds. A NaN fails every comparison, so it is refused like any other."""
    if not condition:
        raise InvalidRequest(f"{param} is {value}; it must be {allowed}", param=param)
