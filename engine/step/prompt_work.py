"""Prompt logprobs and pooled hidden states: what a step returns for prompts besides sampled tokens.

Few requests ask for either. `find_prompt_work` determines what a plan's step has to compute; each runner
implements the computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.attention.interface import IntArray
from engine.dispatch.limits import EngineLimits
from engine.dispatch.records import PromptLogprobs, StepPlan
from engine.dispatch.sampling import Pooling
from engine.step.row_ledger import PlanError, RowLedger


@dataclass(frozen=True, slots=True)
class LogprobsChunk:
    """Prompt tokens of one request whose prompt logprobs a step returns.

    Attributes:
        index: the request's index in the plan's columns.
        row: its row.
        start: position of the first token that the step computes. Prompt logprobs begin with the next token.
        count: number of tokens with prompt logprobs, at least 1.
        num_top: top entries of each.
    """

    index: int
    row: int
    start: int
    count: int
    num_top: int


@dataclass(frozen=True, slots=True)
class PooledChunk:
    """Positions of one request that a step adds to a pooled state.

    Attributes:
        index: the request's index in the plan's columns.
        row: its row.
        begin, end: the range of tokens to add, as offsets into those that the step computes; may be empty.
        continues: whether the row already holds a partial sum to add to.
        divisor: the sum is complete and is divided by this; 0 if more chunks follow.
    """

    index: int
    row: int
    begin: int
    end: int
    continues: bool
    divisor: int


@dataclass(frozen=True, slots=True)
class PromptWork:
    """The prompt logprobs and pooling of one step; at least one of the two is not empty."""

    logprobs: Sequence[LogprobsChunk]
    pooled: Sequence[PooledChunk]


def find_prompt_work(plan: StepPlan, rows: RowLedger) -> PromptWork | None:
    """The prompt logprobs and pooling that an applied and checked plan requires; None if there are none.

    Raises:
        PlanError: they do not fit into one result.
    """
    if not rows.watched:
        return None
    logprobs, pooled = [], []
    for index in np.flatnonzero(np.isin(plan.rows, list(rows.watched))).tolist():
        row, start, count = int(plan.rows[index]), int(plan.starts[index]), int(plan.counts[index])
        parameters = rows.sampling.parameters(row)
        num_prompt_tokens = int(parameters["num_prompt_tokens"])
        if start + count >= num_prompt_tokens:
            rows.watched.discard(row)
        if parameters["pooling"]:
            pooled.append(_pooled_chunk(index, row, start, count, num_prompt_tokens, parameters["pooling"]))
        told = min(start + count, num_prompt_tokens - 1) - start
        if parameters["prompt_logprobs"] >= 0 and told > 0:
            logprobs.append(LogprobsChunk(index, row, start, told, int(parameters["prompt_logprobs"])))
    _check_limits(logprobs, pooled, rows.limits)
    return PromptWork(logprobs, pooled) if logprobs or pooled else None


def _pooled_chunk(
    index: int, row: int, start: int, count: int, num_prompt_tokens: int, kind: int
) -> PooledChunk:
    is_last = start + count == num_prompt_tokens
    if kind == Pooling.MEAN:
        return PooledChunk(index, row, 0, count, start > 0, num_prompt_tokens if is_last else 0)
    if kind == Pooling.CLS:
        return PooledChunk(index, row, 0, int(start == 0), start > 0, int(is_last))
    return PooledChunk(index, row, count - int(is_last), count, False, int(is_last))


def _check_limits(logprobs: list[LogprobsChunk], pooled: list[PooledChunk], limits: EngineLimits) -> None:
    num_tokens, num_pooled = (
        sum(chunk.count for chunk in logprobs),
        sum(chunk.divisor > 0 for chunk in pooled),
    )
    if num_tokens > limits.max_prompt_logprobs:
        raise PlanError(
            f"the step tells the log probabilities of {num_tokens} prompt tokens; at most "
            f"{limits.max_prompt_logprobs} are allowed"
        )
    if num_pooled > limits.max_pooled:
        raise PlanError(f"the step ends {num_pooled} pooled prompts; at most {limits.max_pooled} are allowed")


@dataclass(frozen=True, slots=True)
class LogprobsPlaces:
    """Indices for N prompt tokens whose prompt logprobs a step returns, chunk after chunk.

    Attributes:
        hidden: index of the position before each token, among the step's tokens, [N].
        targets: index of each token in the flattened token ids of all rows, [N].
        num_top: the most top entries that any chunk asks for.
    """

    hidden: IntArray
    targets: IntArray
    num_top: int


def logprobs_places(chunks: Sequence[LogprobsChunk], begins: IntArray, max_model_len: int) -> LogprobsPlaces:
    """The indices for the chunks of a step. `begins` says where the tokens of each request of the plan begin,
    in the plan's order."""
    hidden = [begins[chunk.index] + np.arange(chunk.count) for chunk in chunks]
    targets = [chunk.row * max_model_len + chunk.start + 1 + np.arange(chunk.count) for chunk in chunks]
    return LogprobsPlaces(
        np.concatenate(hidden), np.concatenate(targets), max(chunk.num_top for chunk in chunks)
    )


def split_logprobs(
    chunks: Sequence[LogprobsChunk], logprobs: np.ndarray, top_ids: np.ndarray, top_logprobs: np.ndarray
) -> list[PromptLogprobs]:
    """Splits arrays over all tokens into the entries of a step's result. The entries are views."""
    entries, begin = [], 0
    for chunk in chunks:
        end, top = begin + chunk.count, slice(chunk.num_top)
        entries.append(
            PromptLogprobs(
                chunk.index,
                chunk.start + 1,
                logprobs[begin:end],
                top_ids[begin:end, top],
                top_logprobs[begin:end, top],
            )
        )
        begin = end
    return entries
