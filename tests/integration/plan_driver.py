"""Drives a model runner by plans made by hand: a scheduler just large enough for the engine's own tests.

It gives every request its own blocks in each KV group, never preempts, and runs one step at a time or one
ahead. A request with a mask waits for each of its tokens before the next is planned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from engine.cpu.runner import CpuModelRunner
from engine.dispatch.records import NewRequest, PromptLogprobs, StepPlan, StepResult, TokenLogprobs
from engine.dispatch.sampling import F32Array, SamplingRecord, U32Array, u32
from engine.step.runner import PendingStep

GREEDY = SamplingRecord(temperature=0.0)


@dataclass
class DrivenRequest:
    """One request's state, as a scheduler would keep it.

    `mask`, if there is one, gives the mask of its next token from its output. `blocks` has one of each KV
    group for every block of tokens.
    """

    row: int
    token_ids: list[int]
    num_prompt_tokens: int
    max_tokens: int
    sampling: SamplingRecord
    blocks: list[tuple[int, ...]] = field(default_factory=list)
    num_computed: int = 0
    num_planned: int = 0
    entered: bool = False
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    pooled: F32Array | None = None
    mask: Callable[[list[int]], U32Array] | None = None

    @property
    def planned_tokens(self) -> int:
        """Tokens in the worker's row once every planned step has run."""
        return len(self.token_ids) + self.num_planned


def plan_fork(prompt: list[int], tokens: list[int], *, copied: bool) -> list[StepPlan]:
    """Two steps: a prompt, of a block at most, in row 0 and block 3; then a request that begins with it, in
    row 1, whose block is a copy of that one, or computed. Both are greedy, and tell log probabilities.
    """
    sampling = SamplingRecord(temperature=0.0, logprobs=3)
    whole, none = prompt + tokens, u32([])

    def plan(step_id: int, row: int, token_ids: list[int], start: int, **more: U32Array) -> StepPlan:
        request = NewRequest(row, u32(token_ids), len(prompt), u32([3 + row]), sampling)
        count = len(token_ids) - start
        columns = (u32([row]), u32([start]), u32([count]), u32([1]), u32([0]))
        return StepPlan(step_id, none, [request], *columns, none, **more)

    if not copied:
        return [plan(0, 0, prompt, 0), plan(1, 1, whole, 0)]
    return [plan(0, 0, prompt, 0), plan(1, 1, whole, len(prompt), copied_blocks=u32([(3, 4)]))]


class PlanDriver:
    """Plans steps for a runner until every request has its tokens."""

    def __init__(self, runner: CpuModelRunner, *, budget: int | None = None, steps_ahead: int = 0) -> None:
        self.runner = runner
        self.budget = budget or runner.rows.limits.max_num_batched_tokens
        self.steps_ahead = steps_ahead
        self.free_rows = list(range(runner.rows.limits.max_num_seqs))[::-1]
        # Shuffled, so that no test passes because blocks happen to lie in order.
        pool = np.random.default_rng(0).permutation(runner.rows.limits.num_blocks)
        self.num_groups = runner.rows.limits.num_kv_groups
        num_sets = len(pool) // self.num_groups
        sets = pool[: num_sets * self.num_groups].reshape(num_sets, self.num_groups)
        self.free_blocks = [tuple(blocks) for blocks in sets.tolist()]
        self.freed_rows: list[int] = []
        self.running: list[DrivenRequest] = []
        self.step_id = 0

    def generate(
        self,
        prompts: list[list[int]],
        max_tokens: int | list[int],
        sampling: SamplingRecord | list[SamplingRecord] = GREEDY,
    ) -> list[DrivenRequest]:
        """Runs the prompts together, each to exactly its max_tokens tokens."""
        limits = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
        records = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
        requests = [
            self.add(prompt, limit, record)
            for prompt, limit, record in zip(prompts, limits, records, strict=True)
        ]
        self.run()
        return requests

    def add(self, prompt: list[int], max_tokens: int, sampling: SamplingRecord = GREEDY) -> DrivenRequest:
        """A request that enters with the next step that has budget for it."""
        request = DrivenRequest(self.free_rows.pop(), list(prompt), len(prompt), max_tokens, sampling)
        self.running.append(request)
        return request

    def run(self) -> None:
        """Steps until nothing is running."""
        in_flight: deque[tuple[PendingStep, StepPlan, list[DrivenRequest]]] = deque()
        while self.running or in_flight:
            planned = self.plan()
            if planned is not None:
                in_flight.append((self.runner.launch(planned[0]), *planned))
            if planned is None or len(in_flight) > self.steps_ahead:
                pending, plan, requests = in_flight.popleft()
                self.update(pending.result(), plan, requests)

    def plan(self) -> tuple[StepPlan, list[DrivenRequest]] | None:
        """The next step and the requests in it; None if there is nothing to compute."""
        budget = self.budget
        scheduled: list[tuple[DrivenRequest, int, list[tuple[int, ...]]]] = []
        new_requests = []
        for request in self.running:
            done = len(request.output) + request.num_planned >= request.max_tokens
            count = min(request.planned_tokens - request.num_computed, budget)
            waits = request.mask is not None and request.num_planned > 0
            if done or waits or count == 0:
                continue
            blocks = self._grow(request, request.num_computed + count)
            if not request.entered:
                request.entered = True
                tokens, held = u32(request.token_ids), self._by_group(blocks)
                new_requests.append(
                    NewRequest(request.row, tokens, request.num_prompt_tokens, held, request.sampling)
                )
                blocks = []
            scheduled.append((request, count, blocks))
            budget -= count
        if not scheduled:
            return None
        return self._advance(scheduled, new_requests)

    def update(self, result: StepResult, plan: StepPlan, requests: list[DrivenRequest]) -> None:
        """Takes in a step's tokens; finished requests leave their rows and blocks."""
        assert result.error == "", result.error
        for told in result.prompt_logprobs:
            requests[told.index].prompt_logprobs.append(told)
        for index, state in result.pooled.items():
            requests[index].pooled = state
            self._finish(requests[index])
        sampling = [request for request, samples in zip(requests, plan.samples, strict=True) if samples]
        assert len(result.token_ids) == len(sampling)
        for index, request in enumerate(sampling):
            request.num_planned -= 1
            token_id = int(result.token_ids[index])
            request.token_ids.append(token_id)
            request.output.append(token_id)
            if request.sampling.logprobs >= 0:
                request.logprobs.append(result.logprobs[index])
            if len(request.output) == request.max_tokens:
                self._finish(request)

    def _finish(self, request: DrivenRequest) -> None:
        self.running.remove(request)
        self.freed_rows.append(request.row)
        self.free_rows.append(request.row)
        self.free_blocks.extend(request.blocks)

    def _grow(self, request: DrivenRequest, num_tokens: int) -> list[tuple[int, ...]]:
        needed = -(-num_tokens // self.runner.rows.limits.block_size) - len(request.blocks)
        blocks = [self.free_blocks.pop() for _ in range(needed)]
        request.blocks.extend(blocks)
        return blocks

    def _by_group(self, blocks: list[tuple[int, ...]]) -> U32Array:
        return u32([each[group] for group in range(self.num_groups) for each in blocks])

    def _advance(
        self,
        scheduled: list[tuple[DrivenRequest, int, list[tuple[int, ...]]]],
        new_requests: list[NewRequest],
    ) -> tuple[StepPlan, list[DrivenRequest]]:
        starts = [request.num_computed for request, _, _ in scheduled]
        samples, masks = [], {}
        for index, (request, count, _) in enumerate(scheduled):
            request.num_computed += count
            at_end = request.num_computed == request.planned_tokens
            samples.append(int(at_end and not request.sampling.pooling))
            request.num_planned += samples[-1]
            if samples[-1] and request.mask is not None:
                masks[index] = request.mask(request.output)
        plan = StepPlan(
            step_id=self.step_id,
            freed_rows=u32(self.freed_rows),
            new_requests=new_requests,
            rows=u32([request.row for request, _, _ in scheduled]),
            starts=u32(starts),
            counts=u32([count for _, count, _ in scheduled]),
            samples=u32(samples),
            num_new_blocks=u32([len(blocks) for _, _, blocks in scheduled]),
            new_block_ids=self._by_group([block for _, _, blocks in scheduled for block in blocks]),
            masks=masks,
            num_kv_groups=self.num_groups,
        )
        self.step_id += 1
        self.freed_rows = []
        return plan, [request for request, _, _ in scheduled]
