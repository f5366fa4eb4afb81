"""How a completion is sampled and when it stops, in one type for every entry point."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from pagewire.base.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LENGTH = 1024
MAX_TOKEN_LIST = 1024
MAX_COMPLETIONS = 128
MAX_BEAMS = MAX_LOGPROBS // 2
MAX_BAD_WORDS = 128
MAX_CONSTRAINT_LENGTH = 256 * 1024
INT32_MAX = 2**31 - 1
INT64_RANGE = range(-(2**63), 2**63)


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """What a completion's text must look like; exactly one of these.

    Attributes:
        json_object: any JSON object.
        json_schema: JSON that this JSON Schema, itself JSON, validates.
        regex: text that this regular expression matches as a whole.
        choices: one of these texts.
        grammar: text of this context-free grammar, as llama.cpp (GBNF) or Lark writes them.

    Raises:
        InvalidRequest: there is none, there are two, or it is too long.
    """

    json_object: bool = False
    json_schema: str | None = None
    regex: str | None = None
    choices: Sequence[str] = ()
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in STRUCTURED_OUTPUTS if getattr(self, name) not in (None, False, ())]
        _require(
            len(given) == 1,
            "structured_output",
            f"a combination of {', '.join(given)}" if given else "empty",
            f"exactly one of {', '.join(STRUCTURED_OUTPUTS)}",
        )
        object.__setattr__(self, "choices", tuple(self.choices))
        size = sum(len(text) for text in (self.json_schema, self.regex, self.grammar, *self.choices) if text)
        _require(
            size <= MAX_CONSTRAINT_LENGTH,
            "structured_output",
            f"{size} characters long",
            f"at most {MAX_CONSTRAINT_LENGTH} characters",
        )


STRUCTURED_OUTPUTS = ("json_object", "json_schema", "regex", "choices", "grammar")


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearch:
    """Search for the likeliest completion instead of sampling one.

    Attributes:
        width: beams kept at every step; None for n.
        length_penalty: scores are divided by the length to this power.
        early_stopping: ends as soon as `width` completions are complete.

    Raises:
        InvalidRequest: a value is out of its range.
    """

    width: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool = False

    def __post_init__(self) -> None:
        _require(
            self.width is None or 1 <= self.width <= MAX_BEAMS,
            "beam_search.width",
            self.width,
            f"between 1 and {MAX_BEAMS}",
        )
        _require(
            -10 <= self.length_penalty <= 10, "length_penalty", self.length_penalty, "between -10 and 10"
        )


SAMPLING_ONLY = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields of a model's own defaults that a search has no use for."""

_NOT_WITH_CONSTRAINTS = ("allowed_token_ids", "ignore_eos")

_NOT_WITH_BEAMS: Mapping[str, Any] = {
    "best_of": None,
    "structured_output": None,
    "stop": (),
    "bad_words": (),
    "logit_bias": {},
    "allowed_token_ids": None,  # nosec B105 # no password
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


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
    allowed_token_ids: Sequence[int] | None = None
    n: int = 1
    best_of: int | None = None
    bad_words: Sequence[str] = ()
    prompt_logprobs: int | None = None
    structured_output: StructuredOutput | None = None
    beam_search: BeamSearch | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "bad_words", "allowed_token_ids"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
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
            self.max_tokens is None or 0 <= self.max_tokens <= INT32_MAX,
            "max_tokens",
            self.max_tokens,
            f"at least 1 (or 0 to read only the prompt) and at most {INT32_MAX}",
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
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(
                value is None or 0 <= value <= MAX_LOGPROBS, name, value, f"between 0 and {MAX_LOGPROBS}"
            )
        self._check_lists()
        self._check_completions()

    @property
    def takes_constraint(self) -> bool:
        """Whether a text that is sampled so can be held to a form."""
        return self.beam_search is None and not any(getattr(self, name) for name in _NOT_WITH_CONSTRAINTS)

    def _check_completions(self) -> None:
        _require(1 <= self.n <= MAX_COMPLETIONS, "n", self.n, f"between 1 and {MAX_COMPLETIONS}")
        _require(
            self.best_of is None or self.n <= self.best_of <= MAX_COMPLETIONS,
            "best_of",
            self.best_of,
            f"at least n ({self.n}) and at most {MAX_COMPLETIONS}",
        )
        if self.structured_output is not None:
            for name in _NOT_WITH_CONSTRAINTS:
                _require(not getattr(self, name), name, "set", "unset with structured output")
        if self.beam_search is not None:
            self._check_beams(self.beam_search)

    def _check_beams(self, beams: BeamSearch) -> None:
        """A search ranks by the model's own probabilities and returns what is likeliest, so that whatever
        changes them, or cuts a text short, has no place in it."""
        width = self.n if beams.width is None else beams.width
        _require(
            self.n <= width <= MAX_BEAMS,
            "beam_search.width",
            width,
            f"at least n ({self.n}) and at most {MAX_BEAMS}",
        )
        for name, nothing in _NOT_WITH_BEAMS.items():
            _require(getattr(self, name) == nothing, name, "set", "unset with beam search")

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
        _require(
            len(self.bad_words) <= MAX_BAD_WORDS,
            "bad_words",
            f"a list of {len(self.bad_words)}",
            f"at most {MAX_BAD_WORDS} strings",
        )
        for text in self.bad_words:
            _require(
                0 < len(text) <= MAX_STOP_STRING_LENGTH,
                "bad_words",
                f"a string of {len(text)} characters",
                f"strings of 1 to {MAX_STOP_STRING_LENGTH} characters",
            )
        _require(
            self.allowed_token_ids != (),
            "allowed_token_ids",
            "empty, which allows no token",
            "left out, or name at least one token",
        )
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            size = len(getattr(self, name) or ())
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
            for token_id in getattr(self, name) or ():
                _require(
                    0 <= token_id < vocab_size,
                    name,
                    f"token id {token_id}",
                    f"between 0 and {vocab_size - 1}",
                )


def seed_of_completion(seed: int, number: int) -> int:
    """The seed of a prompt's completion number `number`: for the first the seed itself, for the others a hash
    of both, so that requests with neighbouring seeds have no completion in common.

    Args:
        seed: the request's, a signed 64-bit integer; so is what is returned.
        number: from 0.
    """
    if number == 0:
        return seed
    digest = blake2b(struct.pack("<qI", seed, number), digest_size=8, person=b"completion")
    return int.from_bytes(digest.digest(), "little", signed=True)


def _require(condition: bool, param: str, value: object, allowed: str) -> None:
    """Raises unless the condition holds. A NaN fails every comparison, so it is refused like any other."""
    if not condition:
        raise InvalidRequest(f"{param} is {value}; it must be {allowed}", param=param)
