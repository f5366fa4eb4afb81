"""How a request is sampled: the one definition of its parameters.

The packing into plans (records.py), the worker's table by row (engine/sampling/parameters.py) and the columns
that kernels read (engine/cuda/step_shape.py) all derive from the fields of SamplingRecord. A new parameter is
one line here and the code that uses it.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from itertools import chain, islice
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt

U32 = np.dtype("<u4")
F32 = np.dtype("<f4")
U32Array = npt.NDArray[np.uint32]
F32Array = npt.NDArray[np.float32]

# Takes so many of a record's 32-bit words.
Take = Callable[[int], U32Array]


class RecordError(ValueError):
    """A record is malformed: wrong version, or lengths that do not add up."""


class Pooling(IntEnum):
    """What a request wants of its prompt's final hidden states instead of tokens: nothing, the last token's,
    the mean of all, or the first token's."""

    NONE = 0
    LAST = 1
    MEAN = 2
    CLS = 3


def u32(values: Sequence[int]) -> U32Array:
    """A little-endian uint32 array of the values."""
    return np.array(values, dtype=U32)


class ListFormat(ABC):
    """How a parameter of variable length lies in a record: some counts, and 32-bit words.

    Attributes:
        num_counts: how many counts there are.
    """

    num_counts: int

    @abstractmethod
    def pack(self, value: Any) -> tuple[tuple[int, ...], list[U32Array]]:
        """The counts and the words."""

    @abstractmethod
    def take(self, counts: tuple[int, ...], take: Take) -> Any:
        """The value whose counts these are.

        Raises:
            RecordError: the words contradict them.
        """

    @abstractmethod
    def num_words(self, value: Any) -> int:
        """How many words it takes."""


class _Tokens(ListFormat):
    num_counts = 1

    def pack(self, value: tuple[int, ...]) -> tuple[tuple[int, ...], list[U32Array]]:
        return (len(value),), [u32(value)]

    def take(self, counts: tuple[int, ...], take: Take) -> tuple[int, ...]:
        return tuple(take(counts[0]).tolist())

    def num_words(self, value: tuple[int, ...]) -> int:
        return len(value)


class _Biases(ListFormat):
    num_counts = 1

    def pack(self, value: tuple[tuple[int, float], ...]) -> tuple[tuple[int, ...], list[U32Array]]:
        biases = np.array([bias for _, bias in value], dtype=F32)
        return (len(value),), [u32([token_id for token_id, _ in value]), biases.view(U32)]

    def take(self, counts: tuple[int, ...], take: Take) -> tuple[tuple[int, float], ...]:
        token_ids = take(counts[0]).tolist()
        return tuple(zip(token_ids, take(counts[0]).view(F32).tolist(), strict=True))

    def num_words(self, value: tuple[tuple[int, float], ...]) -> int:
        return 2 * len(value)


class _Sequences(ListFormat):
    num_counts = 2  # sequences, and tokens in all of them

    def pack(self, value: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], list[U32Array]]:
        if not value:
            return (0, 0), []
        tokens = list(chain.from_iterable(value))
        return (len(value), len(tokens)), [u32([len(each) for each in value]), u32(tokens)]

    def take(self, counts: tuple[int, ...], take: Take) -> tuple[tuple[int, ...], ...]:
        num_sequences, num_tokens = counts
        lengths, tokens = take(num_sequences).tolist(), iter(take(num_tokens).tolist())
        if sum(lengths) != num_tokens:
            raise RecordError(f"{num_tokens} tokens of bad words, but their lengths sum to {sum(lengths)}")
        return tuple(tuple(islice(tokens, length)) for length in lengths)

    def num_words(self, value: tuple[tuple[int, ...], ...]) -> int:
        return sum(1 + len(each) for each in value)


def _scalar(kind: str, default: Any, *, is_column: bool = False, is_penalty: bool = False) -> Any:
    """A parameter that is one number.

    Args:
        kind: how it lies in a record, as numpy names it.
        default: of a request that does not set it.
        is_column: whether the sampling kernel reads it for every request of a step.
        is_penalty: whether it changes logits by the tokens so far, unless it has its default.
    """
    return field(default=default, metadata={"kind": kind, "is_column": is_column, "is_penalty": is_penalty})


def _list(format: ListFormat) -> Any:
    """A parameter of variable length; empty by default."""
    return field(default=(), metadata={"format": format})


@dataclass(frozen=True, slots=True)
class SamplingRecord:
    """The token-level sampling parameters of a request, resolved: no value is unset.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 filter nothing; `logprobs` -1 asks for
    none, otherwise for that many top entries (0 to 20) besides the sampled token's own. `seed` is a signed
    64-bit integer; the generator is keyed by (seed, position of the sampled token in the sequence), so the
    same request draws the same numbers in any batch and after any preemption. `masked_until_min_tokens`
    are the stop tokens that may not be generated before `min_tokens` output tokens.

    `bad_words` are token sequences that the output may not contain: the token that would complete one is not
    generated, unless nothing else could be; what stands in the prompt does not count. `prompt_logprobs` is to
    the prompt's tokens what `logprobs` is to sampled ones. With `pooling`, a Pooling, it samples nothing.
    """

    temperature: float = _scalar("<f4", 1.0, is_column=True)
    top_p: float = _scalar("<f4", 1.0, is_column=True)
    top_k: int = _scalar("<i4", 0, is_column=True)
    min_p: float = _scalar("<f4", 0.0, is_column=True)
    repetition_penalty: float = _scalar("<f4", 1.0, is_penalty=True)
    presence_penalty: float = _scalar("<f4", 0.0, is_penalty=True)
    frequency_penalty: float = _scalar("<f4", 0.0, is_penalty=True)
    seed: int = _scalar("<i8", 0)
    min_tokens: int = _scalar("<u4", 0)
    logprobs: int = _scalar("<i4", -1)
    prompt_logprobs: int = _scalar("<i4", -1)
    pooling: int = _scalar("<u4", Pooling.NONE)
    masked_until_min_tokens: tuple[int, ...] = _list(_Tokens())
    logit_bias: tuple[tuple[int, float], ...] = _list(_Biases())
    allowed_token_ids: tuple[int, ...] = _list(_Tokens())
    bad_words: tuple[tuple[int, ...], ...] = _list(_Sequences())

    @property
    def num_words(self) -> int:
        """32-bit words of the lists."""
        return sum(format.num_words(getattr(self, name)) for name, format in LISTS.items())

    @property
    def has_penalties(self) -> bool:
        """Whether logits change by the tokens so far."""
        return any(getattr(self, name) != neutral for name, neutral in PENALTIES.items())


def _having(key: str) -> dict[str, Any]:
    """Parameter -> what its definition says of the key, where that is anything; in order of definition."""
    return {each.name: each.metadata[key] for each in fields(SamplingRecord) if each.metadata.get(key)}


SCALARS: dict[str, str] = _having("kind")
"""Parameters that are numbers -> how each lies in a record."""
COLUMNS = tuple(_having("is_column"))
"""Those of them that the sampling kernel reads for every request of a step."""
PENALTIES = {each.name: each.default for each in fields(SamplingRecord) if each.metadata.get("is_penalty")}
"""Those that change logits by the tokens so far -> the value that changes nothing."""
LISTS: dict[str, ListFormat] = _having("format")
"""Parameters of variable length -> how they lie in a record."""
NUM_COUNTS = sum(format.num_counts for format in LISTS.values())

scalars_of: Callable[[SamplingRecord], tuple[Any, ...]] = attrgetter(*SCALARS)
"""A record's numbers, in the order of SCALARS."""

_STRUCT_CODES = {"<f4": "f", "<i4": "i", "<u4": "I", "<i8": "q"}
SCALARS_FORMAT = "".join(_STRUCT_CODES[kind] for kind in SCALARS.values())
"""Of the numbers, for `struct`."""
assert struct.calcsize("<" + SCALARS_FORMAT) == sum(np.dtype(kind).itemsize for kind in SCALARS.values())


def pack_lists(record: SamplingRecord) -> tuple[list[int], list[U32Array]]:
    """The counts of all lists, and their words."""
    counts: list[int] = []
    words: list[U32Array] = []
    for name, format in LISTS.items():
        more_counts, more_words = format.pack(getattr(record, name))
        counts += more_counts
        words += more_words
    return counts, words


def unpack(scalars: tuple[Any, ...], counts: tuple[int, ...], take: Take) -> SamplingRecord:
    """The record that was packed.

    Raises:
        RecordError: it is malformed.
    """
    values = dict(zip(SCALARS, scalars, strict=True))
    try:
        values["pooling"] = Pooling(values["pooling"])
    except ValueError:
        raise RecordError(f"{values['pooling']} is no kind of pooling") from None
    begin = 0
    for name, format in LISTS.items():
        end = begin + format.num_counts
        values[name] = format.take(counts[begin:end], take)
        begin = end
    return SamplingRecord(**values)
