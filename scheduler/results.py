"""Checks a step's result and sorts out what it contains for requests that changed since it was planned."""

from __future__ import annotations

import numpy as np

from engine.dispatch.records import PromptLogprobs, StepResult
from scheduler.request import Request, Status
from scheduler.step import InFlight


def check(step: InFlight, result: StepResult) -> None:
    """Checks the number of tokens in a result.

    Raises:
        ValueError: it does not fit the step: the worker is broken.
    """
    counts = result.num_tokens
    if counts is not None:
        if len(counts) != len(step.sampled):
            raise ValueError(
                f"step {step.step_id} samples {len(step.sampled)} requests, its result is of {len(counts)}"
            )
        drafts = np.zeros(len(counts), np.int64) if step.drafts is None else step.drafts
        if (counts > drafts + 1).any():
            index = int((counts > drafts + 1).argmax())
            raise ValueError(
                f"step {step.step_id} has {drafts[index]} drafts of a request, which gains {counts[index]}"
            )
    elif step.drafts is not None:
        raise ValueError(f"step {step.step_id} has drafts, but its result does not say what was accepted")
    elif len(result.token_ids) != len(step.sampled):
        raise ValueError(
            f"step {step.step_id} samples {len(step.sampled)} requests, its result has "
            f"{len(result.token_ids)} tokens"
        )


def take_untold(step: InFlight, result: StepResult) -> list[tuple[Request, PromptLogprobs]]:
    """The prompt logprobs in a result that were not reported before; marks them as reported. Repeated ones
    come when a prompt is recomputed.

    Raises:
        ValueError: some prompt logprobs are missing: the worker is broken.
    """
    told = []
    for entry in result.prompt_logprobs:
        request = step.request_at(entry.index)
        if request.status is Status.ENDED:
            continue
        num_known = request.next_prompt_logprobs - entry.first
        if num_known < 0:
            raise ValueError(f"step {step.step_id} left out {-num_known} log probabilities of a prompt")
        if num_known < len(entry.logprobs):
            request.next_prompt_logprobs = entry.first + len(entry.logprobs)
            told.append((request, _from(entry, num_known)))
    return told


def tokens_kept(request: Request, token_ids: list[int]) -> tuple[list[int], bool]:
    """(the tokens up to the request's end, whether the last of them is a stop token), of several tokens that
    one step sampled for a request."""
    kept = token_ids[: request.max_total_tokens - len(request.token_ids)]
    first = request.sampling.min_tokens - request.num_output_tokens
    for index, token_id in enumerate(kept):
        if token_id in request.stop_token_ids and index >= first:
            return kept[: index + 1], True
    return kept, False


def _from(entry: PromptLogprobs, begin: int) -> PromptLogprobs:
    """Prompt logprobs without those of the first `begin` tokens."""
    return PromptLogprobs(
        entry.index,
        entry.first + begin,
        entry.logprobs[begin:],
        entry.top_ids[begin:],
        entry.top_logprobs[begin:],
    )


def count_late_tokens(requests: list[Request]) -> list[Request]:
    """Counts one pending token less for each preempted request, whose token was sampled before it lost its
    row. Returns the requests that this token completes.
    """
    waiting = [request for request in requests if request.status is Status.WAITING]
    for request in waiting:
        request.num_pending -= 1
    return [request for request in waiting if len(request.token_ids) >= request.max_total_tokens]
