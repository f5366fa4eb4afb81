"""A step, from draft to outcome, as the core keeps it."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.dispatch.records import NewRequest, TokenLogprobs
from scheduler.request import Request


@dataclass(slots=True)
class Counters:
    """Totals since the start, in tokens where not said otherwise."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_computed_tokens: int = 0
    num_generated_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0


@dataclass(slots=True)
class StepOutput:
    """What a step's result meant for requests.

    Attributes:
        tokens: every request that gained a token, with the token, in the plan's order.
        logprobs: index into `tokens` -> log probabilities.
        ended: requests that ended, after their tokens; `end_reason` says why.
    """

    tokens: list[tuple[Request, int]] = field(default_factory=list)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    ended: list[Request] = field(default_factory=list)


@dataclass(slots=True)
class InFlight:
    """A dispatched step: which requests it computes and which of them it samples. Its result means nothing
    (`void`) if an earlier step failed after it was planned.
    """

    step_id: int
    scheduled: list[Request]
    sampled: list[Request]
    void: bool = False


@dataclass(slots=True)
class Draft:
    """A step being planned."""

    budget: int
    words: int
    scheduled: list[Request] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    num_new_blocks: list[int] = field(default_factory=list)
    new_block_ids: list[int] = field(default_factory=list)
    new_requests: list[NewRequest] = field(default_factory=list)
