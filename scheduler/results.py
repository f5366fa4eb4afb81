"""What a step's result says of requests that are not where the step found them."""

from __future__ import annotations

from engine.dispatch.records import PromptLogprobs, StepResult
from scheduler.request import Request, Status
from scheduler.step import InFlight


def check(step: InFlight, result: StepResult, max_tokens_per_step: int) -> None:
    """Raises:
    ValueError: the result has the wrong number of tokens: a broken worker.
    """
    counts = result.num_tokens
    if counts is not None:
        if len(counts) != len(step.sampled) or int(counts.max(initial=0)) > max_tokens_per_step:
            raise ValueError(
                f"step {step.step_id} samples {len(step.sampled)} requests, each for up to "
                f"{max_tokens_per_step} tokens; its result has {len(counts)} of up to {counts.max(initial=0)}"
            )
    elif len(result.token_ids) != len(step.sampled):
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


def tokens_kept(request: Request, token_ids: list[int]) -> tuple[list[int], bool]:
    """Of several tokens that a request has gained in a step, those up to its end; and whether the last of
    them stops it."""
    kept = token_ids[: request.max_total_tokens - len(request.token_ids)]
    first = request.sampling.min_tokens - request.num_output_tokens
    for index, token_id in enumerate(kept):
        if token_id in request.stop_token_ids and index >= first:
            return kept[: index + 1], True
    return kept, False


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
