"""The scheduler core: decides what each step computes, for which requests and in which KV blocks.

Pure: no I/O, no clock, no globals. `schedule()` plans a step on the assumption that all steps in flight
succeed; `update()` applies the result of the oldest step in flight. There are no separate prefill and decode
phases: a request has tokens, some of which are computed, and every step computes more of them. Chunked
prefill, prefix cache hits and recomputation after preemption all follow from that.

Planning ahead is safe because workers run steps in order: a freed block may be allocated again while an
earlier step still writes to it or reads it, and a block may be shared as soon as the step that fills it is
planned.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from engine.dispatch.limits import EngineLimits
from engine.dispatch.records import StepPlan, StepResult
from engine.dispatch.sampling import F32Array, U32Array
from pagewire.base.errors import Overloaded
from scheduler import results
from scheduler.blocks.groups import KVGroups
from scheduler.blocks.pool import BlockPool
from scheduler.blocks.prefixes import Prefixes
from scheduler.placement import Beginning, Placement
from scheduler.policy import victims
from scheduler.policy.adapters import AdapterSlots
from scheduler.policy.batching import BatchQueue
from scheduler.policy.drafting import Drafting
from scheduler.policy.forecast import Forecast, Progress
from scheduler.policy.shares import Shares
from scheduler.policy.step_time import StepTimes, StepWork
from scheduler.policy.suspects import Suspects, accuse, verdict
from scheduler.policy.waiting import WaitingQueue, check
from scheduler.request import NO_TURN, EndReason, Request, Status
from scheduler.rows import BoolArray, IntArray, Rows, Wants
from scheduler.settings import INFLIGHT, CoreSettings
from scheduler.step import Counters, Draft, InFlight, StepOutput


class Scheduler:
    """Continuous batching over one KV pool.

    Every accepted request ends exactly once: in the `ended` of an `update`, or by `abort`.

    Attributes:
        on_preempted: called with every request that is preempted for others; it may not change the core.
    """

    def __init__(
        self, limits: EngineLimits, settings: CoreSettings | None = None, *, num_stages: int = 1
    ) -> None:
        """`num_stages`: of the pipeline that the worker's ranks are."""
        self.limits, self._num_stages = limits, num_stages
        self.settings = settings = settings or CoreSettings()
        self.pool = BlockPool(limits.num_blocks, enable_caching=settings.enable_prefix_caching)
        self.counters = Counters()
        self.step_times = StepTimes()
        self._drafting = Drafting(limits)
        self.counters.num_accepted_at = [0] * limits.max_drafts
        self.running: list[Request] = []
        self.shares = Shares()
        self._suspects = Suspects()
        self._waiting = self._new_queue()
        self._rows = Rows(limits.max_num_seqs, limits.block_size, limits.num_kv_groups)
        groups = KVGroups(limits.kv_windows, limits.block_size)
        self.prefixes = Prefixes(
            limits.block_size, groups, self.pool, self._rows, enabled=settings.enable_prefix_caching
        )
        self.adapters = AdapterSlots(limits.max_loras)
        self._placement = Placement(limits, groups, self.pool, self._rows, self.prefixes, self.adapters)
        self._forecast = Forecast(
            limits, settings.target_itl, self.step_times, self._waiting, self.shares, self.prefixes
        )
        self._wants = Wants.nothing()
        self._in_flight: deque[InFlight] = deque()
        self._admitted: list[Request] = []
        self._num_arrivals = 0
        self._next_step_id = 0
        self._is_held_up = self._is_full = self._has_arrivals = False
        self.on_preempted: Callable[[Request], None] | None = None

    def _new_queue(self) -> WaitingQueue:
        strategy = self.settings.batching_strategy
        if strategy == INFLIGHT:
            return WaitingQueue(self.shares)
        batch_size = 1 if strategy == "none" else self.limits.max_num_seqs
        return BatchQueue(self.shares, batch_size, lambda: not self.running and not self._suspects)

    @property
    def num_running(self) -> int:
        """Requests that hold a worker row."""
        return len(self.running) + len(self._suspects.running)

    @property
    def num_waiting(self) -> int:
        """Requests accepted but not running."""
        return self._waiting.num_waiting + len(self._suspects) - len(self._suspects.running)

    @property
    def num_clients_waiting(self) -> int:
        """Clients that have requests waiting."""
        return len(self.shares.clients.waiting)

    @property
    def num_batches(self) -> int:
        """Batches begun; 0 where requests are batched in flight."""
        return self._waiting.num_batches

    @property
    def num_in_flight(self) -> int:
        """Planned steps whose result has not been applied yet."""
        return len(self._in_flight)

    @property
    def oldest_work(self) -> StepWork | None:
        """The amount of work in the oldest step in flight; None if no step is in flight."""
        return self._in_flight[0].work if self._in_flight else None

    @property
    def is_full(self) -> bool:
        """Whether the last planned step used up its token budget, or left out prompt tokens for time."""
        return self._is_full

    def describe_oldest(self) -> str:
        """A readable description of the oldest step in flight, for logs and errors."""
        return self._in_flight[0].describe() if self._in_flight else "no step"

    @property
    def awaits_masked_tokens(self) -> bool:
        """Whether a step in flight samples a constrained request. No later step can decode that request
        until the result is known.
        """
        return self._rows.any_masked_pending()

    @property
    def all_are_constrained(self) -> bool:
        """Whether requests hold rows and all of them are constrained."""
        return self._rows.num_constrained == self.num_running > 0

    def some_requests(self, most: int) -> tuple[list[Request], list[Request]]:
        """(running requests in order of service, waiting ones), up to `most` in all, for people who look."""
        running = [*self._suspects.running, *self.running][:most]
        return running, self._waiting.some(most - len(running))

    def num_computed(self, request: Request) -> int:
        """Tokens of a running request whose KV is computed, or will be by the steps in flight."""
        return self._rows.num_computed.item(request.row)

    def add(self, request: Request, *, resumed: bool = False, timeout: float | None = None) -> Request | None:
        """Queues a request.

        Args:
            request: a new request; it may have output already.
            resumed: an earlier scheduler accepted the request. The queue's limits do not apply to it.
            timeout: the request's deadline, in seconds from now. The request is refused if its first token
                is not expected by then.

        Returns:
            The waiting request that was ended with an error to make room for this one, if any: the newest
            one of a client with more waiting requests than this request's client.

        Raises:
            InvalidRequest: the request can never be served.
            Overloaded: the queue is full and this client already has its share of it, or the first token
                would come after the deadline.
        """
        self.check(request)
        refused = None
        if not resumed and timeout is not None:
            self._forecast.check(request, timeout, self._progress())
        if not resumed and self.num_waiting >= self.settings.max_num_waiting:
            refused = self._refuse_for(request)
        request.arrival = self._num_arrivals
        request.turn = NO_TURN + request.arrival
        self._num_arrivals += 1
        self._queue(request, may_be_refused=not resumed)
        return refused

    def overdue(self, request: Request) -> None:
        """Tells that a waiting request has waited as long as it may for others to fill its batch. Nothing
        changes if it waits no more, or where requests are batched in flight.
        """
        self._waiting.overdue(request)

    def retry_after(self, request: Request) -> float:
        """Seconds after which a client should retry a request that the queue had no room for."""
        return self._forecast.retry_after(request, self._progress())

    def _progress(self) -> Progress:
        """The state of the running requests, as the forecast needs it."""
        chunked = [request for request in self._wants.chunked if request.status is Status.RUNNING]
        return Progress(
            self._in_flight[-1].work.without_prompts() if self._in_flight else StepWork(),
            sum(self._rows.num_left(request.row) for request in chunked),
            self._is_held_up,
        )

    def _refuse_for(self, request: Request) -> Request:
        """Ends a waiting request to make room in the full queue for `request`; returns the ended one.

        Raises:
            Overloaded: no waiting request may be ended for it.
        """
        refused = self._waiting.to_be_refused(self.shares.of(request.client))
        if refused is None:
            raise Overloaded(
                f"{self.num_waiting} requests are waiting, the most this server queues; try again later",
                retry_after=self.retry_after(request),
            )
        self._end(
            refused,
            EndReason.ERROR,
            error=f"{self.num_waiting} requests are waiting, the most this server queues, and this client "
            "has the most of them; try again later",
        )
        return refused

    def _queue(self, request: Request, *, may_be_refused: bool = False) -> None:
        """Adds a request to the waiting queue, or to the suspects if it is one."""
        self._has_arrivals = True
        if request.suspicion is None:
            self._waiting.add(request, may_be_refused=may_be_refused)
        else:
            self._suspects.add(request)

    def check(self, request: Request) -> None:
        """Checks a request against the engine's limits and lowers its `max_total_tokens` to them.

        Raises:
            InvalidRequest: the request can never be served.
        """
        check(request, self.limits)

    def allow(self, request: Request, mask: U32Array) -> None:
        """Sets the mask for the next token of a constrained request, which unblocks it."""
        request.allow(mask)
        if request.status is Status.RUNNING:
            self._rows.blocked[request.row] = 0
            self._wants.num_steps = 0

    def abort(self, request: Request, reason: EndReason = EndReason.ABORT, error: str = "") -> bool:
        """Ends a request and frees its blocks for the next step. Returns False if it had already ended."""
        if request.status is Status.ENDED:
            return False
        self._end(request, reason, error=error)
        return True

    def _end(
        self, request: Request, reason: EndReason, *, stop_token_id: int | None = None, error: str = ""
    ) -> None:
        was_running, is_suspect = request.status is Status.RUNNING, request.suspicion is not None
        if was_running:
            if not is_suspect:
                self.running.remove(request)
            self._vacate(request)
            self._forecast.row_left()
        request.end(reason, stop_token_id=stop_token_id, error=error)
        if is_suspect:
            self._suspects.forget(request)
        elif not was_running:
            self._waiting.forget(request)

    def _vacate(self, request: Request) -> None:
        """Releases a request's row and blocks, and charges its client."""
        self._placement.leave(request)
        self.adapters.leave(request)
        self._wants.num_steps = 0
        self._bill(request)
        assert request.share is not None
        self.shares.run_no_more(request.share)

    def _bill(self, request: Request) -> None:
        """Charges a client for the tokens its request generated since it was last charged."""
        assert request.share is not None
        self.shares.charge(request.share, len(request.token_ids) - request.num_billed_tokens)
        request.num_billed_tokens = len(request.token_ids)

    def _preempt(self, request: Request) -> None:
        """Preempts a running request. When admitted again, it recomputes what the prefix cache has lost."""
        self._vacate(request)
        request.num_preemptions += 1
        self.counters.num_preemptions += 1
        self._queue(request)
        if self.on_preempted is not None:
            self.on_preempted(request)

    def schedule(self) -> StepPlan | None:
        """Plans the next step and counts it as in flight. Returns None if nothing can be computed now, or
        if a suspect's step must not overlap with other steps.
        """
        if self._suspects.step is not None:
            return None
        if not self._suspects:
            return self._schedule_together()
        suspect = self._suspects.next(self._can_continue)
        if suspect is None or self._suspects.take_turn(self.limits.max_num_batched_tokens):
            plan = self._schedule_together()
            if plan is not None or suspect is None:
                return plan
        return None if self._in_flight else self._schedule_alone(suspect)

    def _can_continue(self, suspect: Request) -> bool:
        """Whether some token of a suspect can be computed now. If not, the suspect waits for its mask."""
        if suspect.status is Status.RUNNING:
            return self._rows.num_left(suspect.row) > 0
        if not self.adapters.admits(suspect):
            return False
        return not suspect.is_blocked or self._placement.can_begin(suspect)

    def _schedule_alone(self, suspect: Request) -> StepPlan:
        """Plans a step for one suspect while no step is in flight, preempting others if it needs their row
        or blocks.
        """
        draft = self._placement.new_draft()
        while not self._place_alone(draft, suspect):
            others = [request for request in self._suspects.running if request is not suspect]
            self._preempt(self.running.pop() if self.running else others[-1])
        end = int(self._rows.num_computed[suspect.row])
        num_tokens = self.limits.max_num_batched_tokens - draft.budget
        plan = self._dispatch(draft)
        self._suspects.tried(self._in_flight[-1], end - num_tokens, end)
        return plan

    def _place_alone(self, draft: Draft, suspect: Request) -> bool:
        """Puts as many of a suspect's uncomputed tokens into the step as fit. Returns False if there is no
        free row or too few free blocks.
        """
        if suspect.status is Status.WAITING:
            return self._rows.next_free is not None and self._admit(draft, suspect)
        start = int(self._rows.num_computed[suspect.row])
        count = draft.fit(suspect, start, min(self._rows.num_left(suspect.row), draft.budget))
        count = self._placement.within_reach(suspect, count)
        needed = self._placement.num_needed(suspect, count)
        if needed > self.pool.num_free:
            return False
        blocks = self.pool.allocate(max(needed, 0))
        self._place(draft, suspect, count, blocks, appended=blocks)
        return True

    def _schedule_together(self) -> StepPlan | None:
        """Plans a step for the requests that are not suspects."""
        draft = self._placement.new_draft()
        if self._waiting.num_waiting and self.shares.is_contended:
            if self._has_arrivals or self._rows.next_free is not None:
                for request in self.running:
                    self._bill(request)
                self._has_arrivals = False
            self._make_room()
        preempted = self._schedule_decodes(draft)
        wants = self._wants
        if wants.chunked and not preempted and self.shares.is_contended:
            self._schedule_waiting(draft, before=wants.chunked[0])
        preempted |= self._schedule_chunks(draft, wants)
        if not preempted:
            self._schedule_waiting(draft)
        self._is_held_up = self._waiting.num_waiting > 0 and draft.budget > 0 and not draft.is_short
        if not draft.scheduled:
            return None
        self._is_full = draft.budget == 0 or draft.is_short
        return self._dispatch(draft)

    def _make_room(self) -> None:
        """Preempts requests of a client that holds many more rows than the client of the first waiting
        request, if that request cannot be admitted otherwise.
        """
        request = self._waiting.first()
        if request is None or request.num_pending:
            return
        if request.is_blocked and not self._placement.can_begin(request):
            return
        if not self.adapters.admits(request):
            return
        assert request.share is not None
        if self.shares.most_running(request.share) is None:
            return
        num_lacking = self._placement.num_lacking(request)
        if self._rows.next_free is not None and num_lacking <= 0:
            return
        for victim in victims.for_newcomer(request, self.running, self.shares, self.pool, num_lacking):
            self.running.remove(victim)
            self._preempt(victim)

    def _schedule_decodes(self, draft: Draft) -> bool:
        """Schedules the running requests that have one token to compute. They come before prompts, so that
        no stream waits for another request's prefill. Returns True if a request was preempted.

        When blocks run out, the last request in order of service is preempted, or one of a client with many
        more rows, unless it is already in this step.
        """
        if self._wants.num_steps == 0:
            self._wants = self._rows.wants(self.running, self._next_step_id, self._num_stages)
        wants, preempted = self._wants, False
        singles = wants.singles
        if not self._placement.decode_all(draft, wants, self._choose_drafts(draft, wants)):
            singles = sorted(wants.decoding + singles, key=lambda each: each.order)
        for request in singles:
            if request.status is Status.RUNNING and draft.budget > 0:
                preempted |= self._continue(draft, request, 1)
        target = self.settings.target_itl
        if target is not None and self._somebody_waits_for_a_token(draft):
            draft.limit_prompts(self.step_times, target, self.limits.block_size)
        return preempted

    def _choose_drafts(self, draft: Draft, wants: Wants) -> IntArray | None:
        """How many drafts each request in `wants.decoding` gets; None if there are none."""
        if not self._drafting.max_drafts:
            return None
        rows = wants.decoding_rows
        most, budget = self._placement.most_drafts(draft, wants)
        return self._drafting.choose(rows, self._rows.arrivals(rows), most, budget)

    def _schedule_chunks(self, draft: Draft, wants: Wants) -> bool:
        """Spends the remaining token budget on prefill chunks of running requests, in order of service.
        Returns True if a request was preempted.
        """
        preempted = False
        for request in wants.chunked:
            if request.status is Status.RUNNING and draft.budget > 0:
                left = self._rows.num_left(request.row)
                preempted |= self._continue(draft, request, min(left, draft.budget))
        return preempted

    def _somebody_waits_for_a_token(self, draft: Draft) -> bool:
        """Whether a running request decodes in this step, or would if its mask were ready."""
        rows = self._rows
        return draft.work.num_decodes > 0 or bool(rows.blocked[rows.constrained].any())

    def _continue(self, draft: Draft, request: Request, count: int) -> bool:
        """Puts `count` more tokens of a running request into the step, or fewer if blocks are short. Returns
        True if a request was preempted for its blocks, possibly this request itself.
        """
        pool, preempted = self.pool, False
        count = draft.fit(request, int(self._rows.num_computed[request.row]), count)
        count = self._placement.within_reach(request, count)
        needed = self._placement.num_needed(request, count)
        if needed > pool.num_free and self._rows.num_drafts[request.row]:
            return False  # it may need fewer once the steps in flight have told how far their drafts took it
        while needed > pool.num_free:
            victim = victims.for_memory(self.running, self.shares, draft.scheduled)
            if victim is None:
                count, needed = self._placement.in_free_blocks(request, count)
                break
            self.running.remove(victim)
            self._preempt(victim)
            preempted = True
            if victim is request:
                return True
        if count > 0:
            blocks = pool.allocate(needed) if needed > 0 else []
            self._place(draft, request, count, blocks, appended=blocks)
        return preempted

    def _schedule_waiting(self, draft: Draft, *, before: Request | None = None) -> None:
        """Admits waiting requests while token budget, rows, blocks and the plan record have room. Requests
        that can compute nothing until they get a mask are skipped.

        Args:
            draft: the step.
            before: a running request. If given, only requests are admitted that have at least its priority
                and whose client was served less than its client.
        """
        while draft.budget > 0 and self._rows.next_free is not None:
            request = self._waiting.first()
            if request is None or (before is not None and not self._is_due_before(request, before)):
                break
            is_blocked = request.is_blocked and not self._placement.can_begin(request)
            if is_blocked or not self.adapters.admits(request):
                self._waiting.set_aside()
            elif request.num_pending or not self._admit(draft, request):
                break
        self._waiting.restore()

    def _is_due_before(self, request: Request, other: Request) -> bool:
        assert request.share is not None
        assert other.share is not None
        return request.priority <= other.priority and self.shares.is_behind(request.share, other.share)

    def _admit(self, draft: Draft, request: Request) -> bool:
        """Admits the first waiting request, or a suspect. Returns False if it does not fit into the step."""
        beginning = self._placement.begin(draft, request)
        if beginning is None:
            return False
        self._enter(request, beginning)
        self._place(draft, request, beginning.count, beginning.blocks, appended=[])
        return True

    def _enter(self, request: Request, beginning: Beginning) -> None:
        """Makes the first waiting request, or a suspect, a running one that holds its cached blocks."""
        is_new, start = request.num_cached_tokens < 0, beginning.start
        if request.suspicion is not None:
            request.share = self.shares.of(request.client)
        assert request.share is not None
        request.num_billed_tokens = request.num_tokens_at_entry = len(request.token_ids)
        self.shares.run(request.share, len(request.token_ids) - start if is_new else 0)
        if request.suspicion is None:
            self._waiting.take_first()
            insort(self.running, request, key=lambda running: running.order)
        self._placement.enter(request, beginning)
        self.adapters.enter(request)
        self.counters.prefix_cache_queries += len(request.token_ids)
        self.counters.prefix_cache_hits += start
        if is_new:
            request.num_cached_tokens = start
            self._admitted.append(request)

    def _place(
        self, draft: Draft, request: Request, count: int, blocks: list[int], *, appended: list[int]
    ) -> None:
        """See Placement.place."""
        self._placement.place(draft, request, count, blocks, appended=appended)
        self._wants.num_steps = 0

    def _dispatch(self, draft: Draft) -> StepPlan:
        plan = self._placement.plan(draft, self._next_step_id)
        rows = draft.sampled_rows
        if self._num_stages > 1:
            self._rows.ready_at[rows] = self._next_step_id + self._num_stages
            self._wants.num_steps = 0
        self._in_flight.append(
            InFlight(
                plan.step_id,
                draft.scheduled,
                draft.sampled,
                rows,
                self._rows.arrivals(rows),
                draft.work,
                drafts=draft.sampled_drafts,
            )
        )
        self._next_step_id += 1
        self.counters.num_steps += 1
        self.counters.num_short_steps += draft.is_short
        self.counters.num_computed_tokens += self.limits.max_num_batched_tokens - draft.budget
        return plan

    def take_admitted(self) -> list[Request]:
        """Requests admitted for the first time since the last call; `num_cached_tokens` is set."""
        admitted, self._admitted = self._admitted, []
        return admitted

    def update(self, result: StepResult) -> StepOutput:
        """Applies the result of the oldest step in flight.

        Raises:
            ValueError: the result belongs to another step, has the wrong number of tokens, or lacks some
                prompt logprobs: the worker is broken.
        """
        if not self._in_flight or self._in_flight[0].step_id != result.step_id:
            raise ValueError(f"result of step {result.step_id} is not of the oldest step in flight")
        step = self._in_flight[0]
        if step.void or result.error:
            self._in_flight.popleft()
            return StepOutput() if step.void else self._fail(step, result.error)
        results.check(step, result)
        told = results.take_untold(step, result) if result.prompt_logprobs else []
        self._in_flight.popleft()
        self.step_times.observe(step.work, result.execute_us * 1e-6)
        self._forecast.ran(result.execute_us * 1e-6)
        rows = step.sampled_rows
        stayed = self._rows.arrivals(rows) == step.sampled_arrivals
        self._learn(step, result, stayed)
        if result.num_tokens is not None:
            output = self._append_several(step, result, stayed.tolist())
        else:
            output = StepOutput(step.sampled, result.token_ids.tolist(), result.logprobs)
            if not stayed.all():  # some requests ended or were preempted after the step was planned
                rows = rows[stayed]
                output = output.without_ended()
            self._append(output, rows)
        output.prompt_logprobs = told
        for column, state in result.pooled.items():
            self._finish_pooling(output, step.request_at(column), state)
        self.counters.num_generated_tokens += len(output.token_ids)
        cleared = self._suspects.came_through(step)
        if cleared is not None:
            insort(self.running, cleared, key=lambda running: running.order)
            self._wants.num_steps = 0
        return output

    def _learn(self, step: InFlight, result: StepResult, stayed: BoolArray) -> None:
        """Counts a step's drafts, and what it took."""
        if not self._drafting.max_drafts:
            return
        if not step.work.num_prompt:
            self._drafting.observe(step.work.num_decodes, result.execute_us * 1e-6)
        if step.drafts is None or result.num_tokens is None:
            return
        rows = step.sampled_rows[stayed]
        self._rows.num_drafts[rows] -= step.drafts[stayed]
        gained = result.num_tokens.astype(np.int64)
        self._drafting.gained(rows, step.drafts[stayed], gained[stayed])
        if result.num_drafts is not None:
            self.counters.count_drafts(result.num_drafts.astype(np.int64), gained)

    def _finish_pooling(self, output: StepOutput, request: Request, state: F32Array) -> None:
        """Ends a request with its pooled state, whether it still runs or waits again."""
        if request.status is not Status.ENDED:
            self._end(request, EndReason.STOP)
            output.pooled.append((request, state))
            output.ended.append(request)

    def _append(self, output: StepOutput, rows: IntArray) -> None:
        """Appends one sampled token to each request and ends the requests that are complete. `rows` are
        those of the requests that still run; the other requests were preempted and wait.
        """
        stopped = []
        for request, token_id in output.tokens:
            request.token_ids.append(token_id)
            if token_id in request.stop_token_ids and request.num_output_tokens > request.sampling.min_tokens:
                stopped.append(request)
        state = self._rows
        known = state.num_known[rows] + 1
        state.num_known[rows] = known
        self.prefixes.publish_filled(rows, known)
        complete = state.holders(rows[known >= state.max_total[rows]])
        if len(rows) < len(output.requests):
            complete += results.count_late_tokens(output.requests)
        for request in stopped:
            self._end(request, EndReason.STOP, stop_token_id=request.token_ids[-1])
        for request in complete:
            if request.status is not Status.ENDED:
                self._end(request, EndReason.LENGTH)
                stopped.append(request)
        output.ended = stopped

    def _append_several(self, step: InFlight, result: StepResult, stayed: Sequence[bool]) -> StepOutput:
        """Like `_append`, for a step that may sample several tokens per request. `stayed` says which
        requests still hold the row they had when the step was planned.
        """
        assert result.num_tokens is not None
        output, state, end = StepOutput(), self._rows, 0
        counts = result.num_tokens.tolist()
        drafts = [0] * len(counts) if result.num_drafts is None else result.num_drafts.tolist()
        for request, count, num_drafts, is_there in zip(step.sampled, counts, drafts, stayed, strict=True):
            begin, end = end, end + count
            if request.status is Status.ENDED:
                continue
            kept, stops = results.tokens_kept(request, result.token_ids[begin:end].tolist())
            if num_drafts:
                request.num_drafts += num_drafts
                request.num_accepted += min(count - 1, len(kept))
            for index in range(begin, begin + len(kept)):
                if index in result.logprobs:
                    output.logprobs[len(output.token_ids) + index - begin] = result.logprobs[index]
            output.requests += [request] * len(kept)
            output.token_ids += kept
            request.token_ids.extend(kept)
            if is_there:
                state.gain(request.row, len(kept))
                self.prefixes.publish(request)
            else:
                request.num_pending -= 1
            if stops:
                self._end(request, EndReason.STOP, stop_token_id=kept[-1])
                output.ended.append(request)
            elif len(request.token_ids) >= request.max_total_tokens:
                self._end(request, EndReason.LENGTH)
                output.ended.append(request)
        self._wants.num_steps = 0
        return output

    def _fail(self, step: InFlight, error: str) -> StepOutput:
        """Handles a step that failed in the worker. The KV cache can no longer be trusted, so all requests
        are recomputed from their known tokens; those of the failed step become suspects and run alone.
        """
        for later in self._in_flight:
            later.void = True
        return StepOutput(ended=self._lose([step], error))

    def _lose(self, steps: Sequence[InFlight], cause: str) -> list[Request]:
        """Makes the requests of lost steps suspects and puts all requests back into the queues with their
        known tokens. Returns the requests that are quarantined.
        """
        condemned = accuse(steps, self._reached)
        self._recompute_all()
        for request in condemned:
            self._end(request, EndReason.ERROR, error=verdict(request, cause))
            self.counters.num_quarantined += 1
        return condemned

    def _reached(self, request: Request) -> int:
        """The most tokens of a request that would be computed after the steps in flight."""
        if request.status is Status.RUNNING:
            return int(self._rows.num_computed[request.row])
        return len(request.token_ids) + request.num_pending

    def _recompute_all(self) -> None:
        live = self._waiting.take_all() + self._suspects.all + self.running
        for request in self.running + self._suspects.running:
            self._vacate(request)
            self.counters.num_preemptions += 1
            request.num_preemptions += 1
        self.running, self._suspects = [], Suspects()
        for request in live:
            request.num_pending = 0
            self._queue(request)
        self.pool.forget()

    def evacuate(self, cause: str) -> tuple[list[Request], list[Request]]:
        """Removes all live requests, because the worker is lost.

        Returns:
            (live, quarantined): `live` are in order of service and can be added to another scheduler as
            `resumed`; they keep their known tokens and suspicions only. `quarantined` have ended, because
            steps failed repeatedly while they ran alone.
        """
        condemned = self._lose(self._in_flight, cause)
        self._in_flight.clear()
        live = sorted(self._waiting.take_all() + self._suspects.all, key=lambda request: request.order)
        self._suspects = Suspects()
        for request in live:
            request.forget_blocks()
        return live, condemned
