"""The decision core: what each step computes, for which requests, in which blocks.

Pure: no I/O, no clock, no globals. `schedule()` plans a step as if all steps in flight had succeeded;
`update()` applies the result of the oldest step in flight. There is no prefill phase and no decode phase: a
request has tokens, some of them computed, and every step computes some more. Chunked prefill, prefix hits
and recomputation after preemption are that same arithmetic.

Order of execution is what makes planning ahead safe: workers run steps in order, so a block freed while an
earlier step still writes to it may be handed out again, and a block may be shared as soon as the step that
fills it has been planned.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence

from engine.dispatch.limits import EngineLimits
from engine.dispatch.records import StepPlan, StepResult
from engine.dispatch.sampling import F32Array, U32Array
from pagewire.base.errors import Overloaded
from scheduler import results
from scheduler.blocks.pool import BlockPool
from scheduler.blocks.prefixes import Prefixes
from scheduler.placement import Beginning, Placement
from scheduler.policy import victims
from scheduler.policy.forecast import Forecast, Progress
from scheduler.policy.shares import Shares
from scheduler.policy.step_time import StepTimes, StepWork
from scheduler.policy.suspects import Suspects, accuse, verdict
from scheduler.policy.waiting import WaitingQueue, check
from scheduler.request import NO_TURN, EndReason, Request, Status
from scheduler.rows import IntArray, Rows, Wants
from scheduler.settings import CoreSettings
from scheduler.step import Counters, Draft, InFlight, StepOutput


class Scheduler:
    """Continuous batching over one KV pool.

    Every accepted request ends exactly once: in the `ended` of an `update`, or by `abort`.
    """

    def __init__(self, limits: EngineLimits, settings: CoreSettings | None = None) -> None:
        self.limits = limits
        self.settings = settings = settings or CoreSettings()
        self.pool = BlockPool(limits.num_blocks, enable_caching=settings.enable_prefix_caching)
        self.counters = Counters()
        self.step_times = StepTimes()
        self.running: list[Request] = []
        self.shares = Shares()
        self._waiting = WaitingQueue(self.shares)
        self._suspects = Suspects()
        self._rows = Rows(limits.max_num_seqs, limits.block_size)
        self.prefixes = Prefixes(
            limits.block_size, self.pool, self._rows, enabled=settings.enable_prefix_caching
        )
        self._placement = Placement(limits, self.pool, self._rows, self.prefixes)
        self._forecast = Forecast(
            limits, settings.target_itl, self.step_times, self._waiting, self.shares, self.prefixes
        )
        self._wants = Wants.nothing()
        self._in_flight: deque[InFlight] = deque()
        self._admitted: list[Request] = []
        self._num_arrivals = 0
        self._next_step_id = 0
        self._is_held_up = self._is_full = self._has_arrivals = False

    @property
    def num_running(self) -> int:
        """Requests that hold a worker row."""
        return len(self.running) + len(self._suspects.running)

    @property
    def num_waiting(self) -> int:
        """Requests admitted but not running."""
        return self._waiting.num_waiting + len(self._suspects) - len(self._suspects.running)

    @property
    def num_clients_waiting(self) -> int:
        """Clients that have requests waiting."""
        return len(self.shares.clients.waiting)

    @property
    def num_in_flight(self) -> int:
        """Steps planned whose result has not been applied."""
        return len(self._in_flight)

    @property
    def oldest_work(self) -> StepWork | None:
        """What the oldest step in flight computes; None if there is none."""
        return self._in_flight[0].work if self._in_flight else None

    @property
    def is_full(self) -> bool:
        """Whether the last step planned had no room, or no time, for all the prompts there were."""
        return self._is_full

    def describe_oldest(self) -> str:
        """The oldest step in flight, for people."""
        return self._in_flight[0].describe() if self._in_flight else "no step"

    @property
    def awaits_masked_tokens(self) -> bool:
        """Whether steps in flight sample constrained requests, which no step can go on with before."""
        return self._rows.any_masked_pending()

    @property
    def all_are_constrained(self) -> bool:
        """Whether none but constrained requests hold rows."""
        return self._rows.num_constrained == self.num_running > 0

    def add(self, request: Request, *, resumed: bool = False, timeout: float | None = None) -> Request | None:
        """Queues a request.

        Args:
            request: a new one, at its beginning or with some output already.
            resumed: it was accepted before, by a scheduler that is gone; no limit of the queue applies.
            timeout: seconds that it has. It is refused if its first token is not likely to come in time.

        Returns:
            The request that was ended with an error for this one to have room: the newest of a client that
            has more waiting than this one's.

        Raises:
            InvalidRequest: it could never be served.
            Overloaded: too many requests wait already, and its client has its part of them; or for too long.
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

    def retry_after(self, request: Request) -> float:
        """Seconds after which a request that found no place in the queue had better come again."""
        return self._forecast.retry_after(request, self._progress())

    def _progress(self) -> Progress:
        """How far what runs is."""
        chunked = [request for request in self._wants.chunked if request.status is Status.RUNNING]
        return Progress(
            self._in_flight[-1].work.without_prompts() if self._in_flight else StepWork(),
            sum(self._rows.num_left(request.row) for request in chunked),
            self._is_held_up,
        )

    def _refuse_for(self, request: Request) -> Request:
        """Ends a waiting request because another has a better claim to its place."""
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
        """Has a request wait, among the suspects if it is one."""
        self._has_arrivals = True
        if request.suspicion is None:
            self._waiting.add(request, may_be_refused=may_be_refused)
        else:
            self._suspects.add(request)

    def check(self, request: Request) -> None:
        """Checks a request against the limits, and cuts its max_total_tokens to them.

        Raises:
            InvalidRequest: it could never be served.
        """
        check(request, self.limits)

    def allow(self, request: Request, mask: U32Array) -> None:
        """Takes the mask for the next token of a request with a constraint, which waits for it."""
        request.allow(mask)
        if request.status is Status.RUNNING:
            self._rows.blocked[request.row] = 0
            self._wants.num_steps = 0

    def abort(self, request: Request, reason: EndReason = EndReason.ABORT, error: str = "") -> bool:
        """Ends a request now; its blocks are free for the next step. False if it had ended already."""
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
        """Takes row and blocks from a request."""
        self._placement.leave(request)
        self._wants.num_steps = 0
        self._bill(request)
        assert request.share is not None
        self.shares.run_no_more(request.share)

    def _bill(self, request: Request) -> None:
        """Charges a client for what its request has generated."""
        assert request.share is not None
        self.shares.charge(request.share, len(request.token_ids) - request.num_billed_tokens)
        request.num_billed_tokens = len(request.token_ids)

    def _preempt(self, request: Request) -> None:
        """Sends a running request back to wait; it will recompute what the prefix cache has lost."""
        self._vacate(request)
        request.num_preemptions += 1
        self.counters.num_preemptions += 1
        self._queue(request)

    def schedule(self) -> StepPlan | None:
        """Plans the next step and counts it as in flight; None if there is nothing to compute, or nothing
        that may be in flight together with what is.
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
        """Whether something of a suspect can be computed now, or it waits for its mask."""
        if suspect.status is Status.RUNNING:
            return self._rows.num_left(suspect.row) > 0
        return not suspect.is_blocked or self._placement.can_begin(suspect)

    def _schedule_alone(self, suspect: Request) -> StepPlan:
        """Plans a step of a suspect, while none is in flight. Whoever holds what it needs makes room."""
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
        """Places what a suspect lacks, as far as one step goes; False if row or blocks are short."""
        if suspect.status is Status.WAITING:
            return self._rows.next_free is not None and self._admit(draft, suspect)
        start = int(self._rows.num_computed[suspect.row])
        count = draft.fit(suspect, start, min(self._rows.num_left(suspect.row), draft.budget))
        needed = self._placement.num_needed(suspect, count)
        if needed > self.pool.num_free:
            return False
        blocks = self.pool.allocate(max(needed, 0))
        self._place(draft, suspect, count, blocks, appended=blocks)
        return True

    def _schedule_together(self) -> StepPlan | None:
        """Plans a step of all requests that are not suspects."""
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
        """Takes rows from a client that has many more of them than the one whose request is next, if that
        cannot be served otherwise.
        """
        request = self._waiting.first()
        if request is None or request.num_pending:
            return
        if request.is_blocked and not self._placement.can_begin(request):
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
        """Gives running requests that need one token theirs, so that no stream waits for another's prompt;
        True if one had to be preempted. They go in order of service. When blocks run out the last in that
        order makes room, or that of a client with many more rows, unless this step computes it already.
        """
        if self._wants.num_steps == 0:
            self._wants = self._rows.wants(self.running)
        wants, preempted = self._wants, False
        singles = wants.singles
        if not self._placement.decode_all(draft, wants):
            singles = sorted(wants.decoding + singles, key=lambda each: each.order)
        for request in singles:
            if request.status is Status.RUNNING and draft.budget > 0:
                preempted |= self._continue(draft, request, 1)
        target = self.settings.target_itl
        if target is not None and self._somebody_waits_for_a_token(draft):
            draft.limit_prompts(self.step_times, target, self.limits.block_size)
        return preempted

    def _schedule_chunks(self, draft: Draft, wants: Wants) -> bool:
        """Gives the rest of the budget to running requests that need more, in order of service; True if one
        had to be preempted.
        """
        preempted = False
        for request in wants.chunked:
            if request.status is Status.RUNNING and draft.budget > 0:
                left = self._rows.num_left(request.row)
                preempted |= self._continue(draft, request, min(left, draft.budget))
        return preempted

    def _somebody_waits_for_a_token(self, draft: Draft) -> bool:
        """Whether a running request gains a token in this step, or could but for its mask."""
        rows = self._rows
        return draft.work.num_decodes > 0 or bool(rows.blocked[rows.constrained].any())

    def _continue(self, draft: Draft, request: Request, count: int) -> bool:
        """Places `count` more tokens of a running request, or fewer if blocks are short; True if some request
        was preempted for it, possibly itself.
        """
        pool, preempted = self.pool, False
        count = draft.fit(request, int(self._rows.num_computed[request.row]), count)
        needed = self._placement.num_needed(request, count)
        while needed > pool.num_free:
            victim = victims.for_memory(self.running, self.shares, draft.scheduled)
            if victim is None:
                held = (len(request.block_ids) + pool.num_free) * self.limits.block_size
                count = min(count, held - int(self._rows.num_computed[request.row]))
                needed = self._placement.num_needed(request, count)
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
        """Admits waiting requests while budget, rows, blocks and the plan record have room. Those of which
        nothing can be computed before they get a mask are passed over.

        Args:
            draft: the step.
            before: a running request; only those are admitted that are as urgent and whose clients were
                served less than its own.
        """
        while draft.budget > 0 and self._rows.next_free is not None:
            request = self._waiting.first()
            if request is None or (before is not None and not self._is_due_before(request, before)):
                break
            if request.is_blocked and not self._placement.can_begin(request):
                self._waiting.set_aside()
            elif request.num_pending or not self._admit(draft, request):
                break
        self._waiting.restore()

    def _is_due_before(self, request: Request, other: Request) -> bool:
        assert request.share is not None
        assert other.share is not None
        return request.priority <= other.priority and self.shares.is_behind(request.share, other.share)

    def _admit(self, draft: Draft, request: Request) -> bool:
        """Moves the first waiting request, or a suspect, into a row, if everything it needs is there."""
        beginning = self._placement.begin(draft, request)
        if beginning is None:
            return False
        self._enter(request, beginning)
        self._place(draft, request, beginning.count, beginning.blocks, appended=[])
        return True

    def _enter(self, request: Request, beginning: Beginning) -> None:
        """Turns the first waiting request, or a suspect, into a running one that holds its prefix hits."""
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
        self._in_flight.append(
            InFlight(
                plan.step_id, draft.scheduled, draft.sampled, rows, self._rows.arrivals(rows), draft.work
            )
        )
        self._next_step_id += 1
        self.counters.num_steps += 1
        self.counters.num_short_steps += draft.is_short
        self.counters.num_computed_tokens += self.limits.max_num_batched_tokens - draft.budget
        return plan

    def take_admitted(self) -> list[Request]:
        """Requests that entered their first step since the last call; `num_cached_tokens` is set."""
        admitted, self._admitted = self._admitted, []
        return admitted

    def update(self, result: StepResult) -> StepOutput:
        """Applies the result of the oldest step in flight.

        Raises:
            ValueError: the result is not that step's, has the wrong number of tokens, or leaves out some of a
                prompt's log probabilities: a broken worker.
        """
        if not self._in_flight or self._in_flight[0].step_id != result.step_id:
            raise ValueError(f"result of step {result.step_id} is not of the oldest step in flight")
        step = self._in_flight[0]
        if step.void or result.error:
            self._in_flight.popleft()
            return StepOutput() if step.void else self._fail(step, result.error)
        results.check(step, result, self.limits.max_tokens_per_step)
        told = results.take_untold(step, result) if result.prompt_logprobs else []
        self._in_flight.popleft()
        self.step_times.observe(step.work, result.execute_us * 1e-6)
        self._forecast.ran(result.execute_us * 1e-6)
        rows = step.sampled_rows
        stayed = self._rows.arrivals(rows) == step.sampled_arrivals
        if result.num_tokens is not None:
            output = self._append_several(step, result, stayed.tolist())
        else:
            output = StepOutput(step.sampled, result.token_ids.tolist(), result.logprobs)
            if not stayed.all():  # some ended, or wait again, since the step was planned
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

    def _finish_pooling(self, output: StepOutput, request: Request, state: F32Array) -> None:
        """Ends a request with its pooled state, wherever it is by now."""
        if request.status is not Status.ENDED:
            self._end(request, EndReason.STOP)
            output.pooled.append((request, state))
            output.ended.append(request)

    def _append(self, output: StepOutput, rows: IntArray) -> None:
        """Gives requests the tokens they gained and ends those whose last it was. `rows` are of the requests
        that run; if there are fewer of them, the rest wait.
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
        """Gives requests the tokens that they gained in a step, where some gained more than one, and ends
        those whose last was among them. `stayed` says which still have the row that they had.
        """
        assert result.num_tokens is not None
        output, state, end = StepOutput(), self._rows, 0
        counts = result.num_tokens.tolist()
        for request, count, is_there in zip(step.sampled, counts, stayed, strict=True):
            begin, end = end, end + count
            if request.status is Status.ENDED:
                continue
            kept, stops = results.tokens_kept(request, result.token_ids[begin:end].tolist())
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
        """Handles a step the worker could not run: its KV is in doubt, so everything is recomputed from the
        tokens known, its requests one by one.
        """
        for later in self._in_flight:
            later.void = True
        return StepOutput(ended=self._lose([step], error))

    def _lose(self, steps: Sequence[InFlight], cause: str) -> list[Request]:
        """Makes suspects of the requests of lost steps, and all requests wait with the tokens they have;
        returns those that end because it was their doing.
        """
        condemned = accuse(steps, self._reached)
        self._recompute_all()
        for request in condemned:
            self._end(request, EndReason.ERROR, error=verdict(request, cause))
            self.counters.num_quarantined += 1
        return condemned

    def _reached(self, request: Request) -> int:
        """How many of a request's tokens would be computed at the end of the steps in flight, at most."""
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
        """Takes every live request out, because the worker is lost.

        Returns:
            Those that live on, in order of service, ready to be added to another scheduler as `resumed`:
            known tokens and suspicions stay, everything else is forgotten. And those that ended, because
            they are to blame.
        """
        condemned = self._lose(self._in_flight, cause)
        self._in_flight.clear()
        live = sorted(self._waiting.take_all() + self._suspects.all, key=lambda request: request.order)
        self._suspects = Suspects()
        for request in live:
            request.forget_blocks()
        return live, condemned
