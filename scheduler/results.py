"""What a step's result says of requests that are not where the step found them."""

from __future__ import annotations

from engine.dispatch.records import PromptLogprobs, StepResult
from scheduler.request import Request, Status
from scheduler.step import InFlight


def check(step: InFlight, result: StepResult) -> None:
    """Raises:
    ValueError: the result has the wrong number of tokens: a broken worker.
    """
    if len(result.token_ids) != len(step.sampled):
        raise ValueError(
            f"step {step.step_id} samples {len(step.sampled)} requests, its result has "
            f"{len(result.token_ids)} tokens"
        )


def take_untold(step: InFlight, result: StepResult) -> list[tuple[Request, PromptLogprobs]]:
    """What was not reported yet of log probabilities of prompts, which counts as reported from now on. The
    same come again when a prompt is recomputed.

    Raises:
        ValueError: some are left out: a broken worker.
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


def _from(entry: PromptLogprobs, begin: int) -> PromptLogprobs:
    """Log probabilities without those of the first `begin` tokens."""
    return PromptLogprobs(
        entry.index,
        entry.first + begin,
        entry.logprobs[begin:],
        entry.top_ids[begin:],
        entry.top_logprobs[begin:],
    )


def count_late_tokens(requests: list[Request]) -> list[Request]:
    """Counts the token that each waiting request has just gained, sampled before it lost its row; returns
    those that are complete with it.
    """
    waiting = [request for request in requests if request.status is Status.WAITING]
    for request in waiting:
        request.num_pending -= 1
    return [request for request in waiting if len(request.token_ids) >= request.max_total_tokens]
