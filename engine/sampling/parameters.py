"""The sampling parameters of the requests in a worker's rows, as columns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from engine.dispatch.sampling import SCALARS, SamplingRecord, U32Array, scalars_of

IntArray = npt.NDArray[np.int64]

_COLUMNS = np.dtype(
    [
        *SCALARS.items(),
        ("num_prompt_tokens", "i8"),
        # Derived: whether the row changes its logits before temperature, or anything at all.
        ("has_penalties", "?"),
        ("has_lists", "?"),
        ("is_plain_greedy", "?"),
    ]
)

# Hotter than this changes nothing: the logits' differences are lost in rounding.
_HOTTEST = 1e20


@dataclass(frozen=True, slots=True)
class TokenLists:
    """A request's parameters that name tokens.

    Attributes:
        bias_ids, bias_values: logit_bias.
        allowed_ids: the only tokens it may generate; empty allows all.
        masked_ids: not before min_tokens. Empty where allowed_ids would leave nothing else.
        bad_words: token sequences that may not appear in the output.
    """

    bias_ids: IntArray
    bias_values: npt.NDArray[np.float32]
    allowed_ids: IntArray
    masked_ids: IntArray
    bad_words: tuple[tuple[int, ...], ...] = ()


@dataclass(slots=True)
class SamplingBatch:
    """The parameters of the requests that sample in one step, S of them.

    Attributes:
        columns: structured array with the fields of SamplingRecord, [S].
        rows: the worker row of each.
        positions: where in its sequence each sampled token goes.
        lists: index in the batch -> token lists, for those that have any.
        masks: index in the batch -> which tokens may be sampled, see StepPlan; for those that have one.
    """

    columns: np.ndarray  # structured, see _COLUMNS
    rows: IntArray
    positions: IntArray
    lists: dict[int, TokenLists]
    masks: dict[int, U32Array] = field(default_factory=dict)


def subset(batch: SamplingBatch, index: IntArray) -> SamplingBatch:
    """The requests at the given indices of a batch, in their order."""
    place = {int(old): new for new, old in enumerate(index)}
    lists = {place[old]: lists for old, lists in batch.lists.items() if old in place}
    masks = {place[old]: mask for old, mask in batch.masks.items() if old in place}
    return SamplingBatch(batch.columns[index], batch.rows[index], batch.positions[index], lists, masks)


@dataclass(slots=True)
class SamplingTable:
    """Parameters by worker row; set when a request enters the row and left behind when it goes."""

    num_rows: int
    _columns: np.ndarray = field(init=False)
    _lists: dict[int, TokenLists] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._columns = np.zeros(self.num_rows, dtype=_COLUMNS)

    def set(self, row: int, record: SamplingRecord, num_prompt_tokens: int) -> None:
        """Stores a request's parameters. They were validated where the request was accepted."""
        masked = record.masked_until_min_tokens if record.min_tokens > 0 else ()
        if record.allowed_token_ids and set(record.allowed_token_ids) <= set(masked):
            masked = ()
        has_lists = bool(record.logit_bias or record.allowed_token_ids or masked or record.bad_words)
        has_penalties = record.has_penalties
        is_plain_greedy = record.temperature == 0 and not has_penalties and not has_lists
        derived = (num_prompt_tokens, has_penalties, has_lists, is_plain_greedy)
        if record.temperature > _HOTTEST:
            record = replace(record, temperature=_HOTTEST)
        self._columns[row] = scalars_of(record) + derived
        self._lists.pop(row, None)
        if has_lists:
            self._lists[row] = TokenLists(
                bias_ids=np.array([token_id for token_id, _ in record.logit_bias], dtype=np.int64),
                bias_values=np.array([value for _, value in record.logit_bias], dtype=np.float32),
                allowed_ids=np.array(record.allowed_token_ids, dtype=np.int64),
                masked_ids=np.array(masked, dtype=np.int64),
                bad_words=record.bad_words,
            )

    def parameters(self, row: int) -> np.void:
        """The columns of one row."""
        parameters: np.void = self._columns[row]
        return parameters

    def seeds(self, rows: IntArray) -> IntArray:
        """The seeds of the given rows."""
        found: IntArray = self._columns["seed"][rows]
        return found

    def select(self, rows: IntArray, positions: IntArray) -> SamplingBatch:
        """The parameters of the given rows, whose next tokens go to the given positions."""
        columns = self._columns[rows]
        lists = {int(i): self._lists[int(rows[i])] for i in np.flatnonzero(columns["has_lists"])}
        return SamplingBatch(columns, rows, positions, lists)
