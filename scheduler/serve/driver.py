"""Drives the engine: attaches to the worker, keeps it one step ahead, hands out what comes back.

One object on the event loop; nothing here blocks. Plans go out shortly before the worker needs them (see
pacing.py), results come in by the worker's eventfd, and the worker's death by its control socket. The worker
may be several that share a model (see group.py); the loss of any of them is the loss of all.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from engine.dispatch.control import MAX_STEPS_IN_FLIGHT, WORK_AHEAD_STEP, is_warm, rank_socket
from engine.dispatch.facts import WorkerFacts
from engine.dispatch.limits import EngineLimits
from engine.dispatch.link import Rank, WorkerLink
from engine.dispatch.records import StepPlan, StepResult, TokenLogprobs
from engine.dispatch.ring import RingError
from engine.dispatch.sampling import RecordError
from pagewire.base.errors import Code, Overloaded, PagewireError, Unavailable
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from scheduler.config import SchedulerConfig
from scheduler.core import Scheduler
from scheduler.masks.relay import LEAST_SECONDS, MaskRelay
from scheduler.request import EndReason, Request
from scheduler.serve.metrics import SchedulerMetrics
from scheduler.serve.outbox import Outbox, Ticket, by_outbox, ticket_of
from scheduler.serve.status import load_message, model_message
from scheduler.step import StepOutput
from scheduler.workers.attach import attach
from scheduler.workers.group import WorkerGroup
from scheduler.workers.pacing import Pacing
from scheduler.workers.watchdog import Watchdog
from scheduler.workers.work_ahead import WorkAhead, work_ahead_plan

if TYPE_CHECKING:
    from scheduler.masks.maker import MaskOutcome

logger = logging.getLogger(__name__)

_IDLE_SECONDS = 1.0


class EngineDriver:
    """Owns the core, the link to the worker and every accepted request until it ends.

    Attributes:
        facts: of the attached worker; of the last one while none is attached; None before the first.
        metrics: what has been counted.
        attached, detached: set while an engine is attached, and while none is.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._group: WorkerGroup | None = None
        self._core: Scheduler | None = None
        self._lost = asyncio.Event()
        self._broken: asyncio.Future[BaseException] | None = None
        self._cause = ""
        self._one_hangs = False
        self._ahead = WorkAhead(more=False)
        self._watchdog: Watchdog | None = None
        self._orphans: list[Request] = []
        self._outboxes: set[Outbox] = set()
        self._pump_scheduled = False
        self._pump_timer: asyncio.TimerHandle | None = None
        self._masks = MaskRelay(self._apply_mask, self._pump)
        self._pacing = Pacing()
        self.facts: WorkerFacts | None = None
        self.attached, self.detached = asyncio.Event(), asyncio.Event()
        self.detached.set()
        self.metrics = SchedulerMetrics(lambda: self._core)

    @property
    def core(self) -> Scheduler | None:
        """The decision core over the attached worker."""
        return self._core

    async def run(self) -> None:
        """Attaches to the worker, again and again when it is lost, until cancelled.

        Raises:
            Exception: what a callback raised, here or in the core. Whatever it had half changed is in doubt,
                so that the process has to end; everything else survives that.
        """
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_exception)
        self._broken = loop.create_future()
        serving = asyncio.create_task(self._serve())
        try:
            await asyncio.wait((serving, self._broken), return_when=asyncio.FIRST_COMPLETED)
            if self._broken.done():
                raise self._broken.result()
            await serving
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            if self._group is not None:
                self._group.close()
            self._masks.close()

    async def _serve(self) -> None:
        config = self._config
        while True:
            link = await attach(config.worker_socket, config.step_timeout, one_hangs=self._one_hangs)
            self._attach(link)
            await self._lost.wait()
            self._detach()

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Ends `run` over an exception in a callback of ours; logs any other."""
        error = context.get("exception")
        if error is None or "handle" not in context or not _is_of_scheduler(error):
            loop.default_exception_handler(context)
        elif self._broken is not None and not self._broken.done():
            self._broken.set_result(error)

    @property
    def _is_broken(self) -> bool:
        return self._broken is not None and self._broken.done()

    def _attach(self, link: WorkerLink) -> None:
        facts, previous = link.facts, self.facts
        if previous is not None and not _is_same_model(facts, previous):
            self._leave_model()
        self.facts = facts
        group = self._group = WorkerGroup(link, self._leave)
        self._ahead = WorkAhead(facts.more_ahead)
        self._one_hangs = False
        self._core = Scheduler(self._limits(facts), self._config.core())
        self._lost.clear()
        self._cause = ""
        loop = asyncio.get_running_loop()
        for rank in group.ranks:
            loop.add_reader(rank.result_fd, self._on_results)
            loop.add_reader(rank.control_fd, self._on_worker_gone, rank)
        config = self._config
        warm = all(is_warm(rank_socket(config.worker_socket, rank.facts.rank)) for rank in group.ranks)
        self._watchdog = Watchdog(group, config.step_timeout, warm, self._describe_oldest, self._leave)
        self.attached.set()
        self.detached.clear()
        logger.info(
            "attached to worker %s: %s on %s, %d blocks of %d tokens",
            ", ".join(str(rank.worker_pid) for rank in group.ranks),
            facts.model,
            ", ".join(rank.facts.device for rank in group.ranks),
            facts.limits.num_blocks,
            facts.limits.block_size,
        )
        orphans, self._orphans = self._orphans, []
        for request in orphans:
            self._resume(request)
        self._tell_model()
        self._pump()
        loop.call_later(_IDLE_SECONDS, self._prepare_masks)

    def _describe_oldest(self) -> str:
        """What the worker does, for people."""
        if self._core is not None and self._core.num_in_flight:
            return self._core.describe_oldest()
        return "work ahead of steps"

    def _on_worker_gone(self, rank: Rank) -> None:
        """Takes what it has finished, because that was not what killed it, and plans no more."""
        assert self._group is not None
        self._lost.set()
        self._on_results()
        self._leave(f"{self._group.name_of(rank)} died")

    def _leave(self, cause: str, one_hangs: bool = False) -> None:
        """Has the worker left, which is lost; the first cause is the true one. `one_hangs`: see `attach`."""
        self._cause = self._cause or cause
        self._one_hangs |= one_hangs
        self._lost.set()

    def _detach(self) -> None:
        """Leaves a worker that is lost: its requests wait, with the tokens they have, for the next one."""
        assert self._group is not None
        assert self._core is not None
        loop = asyncio.get_running_loop()
        for rank in self._group.ranks:
            loop.remove_reader(rank.result_fd)
            loop.remove_reader(rank.control_fd)
        self._group.close()
        assert self._watchdog is not None
        self._watchdog.close()
        self._orphans, quarantined = self._core.evacuate(self._cause)
        for request in quarantined:
            logger.error("request %s is quarantined: %s", request.request_id, self._cause)
            self._finish(request)
            ticket_of(request).outbox.flush(0)
        self.metrics.retire(self._core)
        self.metrics.num_worker_losses += 1
        self._group, self._core = None, None
        self.attached.clear()
        self.detached.set()
        self._tell_model()
        logger.warning("detached: %s; %d requests wait for the next", self._cause, len(self._orphans))

    def _resume(self, request: Request) -> None:
        assert self._core is not None
        try:
            self._core.add(request, resumed=True)
        except PagewireError as error:
            request.end(EndReason.ERROR, error=error.message)
            self._finish(request, error.code, error.param)
            ticket_of(request).outbox.flush(0)

    def _leave_model(self) -> None:
        """Ends all requests that wait, because another model is served now than the one that they were begun
        with: its tokens mean something else, or would go on in another's words.
        """
        self._masks.close()
        for request in list(self._orphans):
            self._end(request, EndReason.ERROR, "the server has changed its model; submit the request again")
            self._finish(request, Code.UNAVAILABLE)
            ticket_of(request).outbox.flush(0)

    def subscribe(self, outbox: Outbox) -> None:
        """Tells this outbox about the model, now and whenever it changes."""
        self._outboxes.add(outbox)
        outbox.set_model(self.model())

    def unsubscribe(self, outbox: Outbox, requests: Iterable[Request]) -> None:
        """Ends a stream: its requests are aborted, their blocks free at once."""
        self._outboxes.discard(outbox)
        for request in list(requests):
            self.abort(request)

    def submit(
        self, request: Request, ticket: Ticket, timeout: float | None, *, resumed: bool = False
    ) -> None:
        """Accepts a request; its events go to the ticket's outbox.

        Raises:
            PagewireError: it is refused: malformed, too much waiting, no engine was ever attached.
        """
        if self._core is None:
            self._hold(request, resumed)
        else:
            refused = self._core.add(request, resumed=resumed, timeout=timeout)
            if refused is not None:
                self.metrics.refused(Code.RESOURCE_EXHAUSTED.name.lower())
                self._finish(refused, Code.RESOURCE_EXHAUSTED, retry_after=self._core.retry_after(refused))
                ticket_of(refused).outbox.flush(0)
        if request.constraint is not None:
            assert self.facts is not None
            self._masks.begin(request, self.facts)
        if timeout is not None:
            loop = asyncio.get_running_loop()
            ticket.deadline = loop.call_later(timeout, self._expire, request)
        self._schedule_pump()

    def _hold(self, request: Request, resumed: bool) -> None:
        """Keeps a request that was sent before its frontend heard of the worker's loss, with those that the
        worker had: perhaps its stream has been open for long, and comes from another scheduler.
        """
        if self.facts is None:
            raise Unavailable("no engine is attached; try again later")
        if not resumed and len(self._orphans) >= self._config.max_num_waiting:
            raise Overloaded(f"{len(self._orphans)} requests wait for the next engine; try again later")
        self._orphans.append(request)

    def _prepare_masks(self) -> None:
        """Has the tokenizer read while nobody is served, who would have to stand still for it."""
        if self._core is None or self._masks.is_open:
            return
        if self._core.num_running or self._core.num_waiting:
            asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._prepare_masks)
        else:
            assert self.facts is not None
            self._masks.prepare(self.facts)

    def _apply_mask(self, outcome: MaskOutcome) -> None:
        """Lets a request go on whose mask is ready, or ends one that cannot."""
        request, error = outcome.request, outcome.error
        if outcome.mask is not None:
            if self._core is not None:
                self._core.allow(request, outcome.mask)
            else:
                request.allow(outcome.mask)
            return
        if error is None:
            self._end(request, EndReason.STOP)
            self._finish(request)
        else:
            self._end(request, EndReason.ERROR, error.message)
            self._finish(request, error.code, error.param)
        ticket_of(request).outbox.flush(0)

    def abort(self, request: Request) -> None:
        """Ends a request at once, without a word to its outbox."""
        if self._end(request, EndReason.ABORT):
            self._settle(request)
            self._schedule_pump()

    def _expire(self, request: Request) -> None:
        error = "the request's deadline passed before it finished"
        if self._end(request, EndReason.ERROR, error):
            self._finish(request, Code.DEADLINE_EXCEEDED)
            ticket_of(request).outbox.flush(0)
            self._schedule_pump()

    def _end(self, request: Request, reason: EndReason, error: str = "") -> bool:
        if self._core is not None:
            return self._core.abort(request, reason, error)
        if request.end_reason is not None:
            return False
        request.end(reason, error=error)
        self._orphans.remove(request)
        return True

    def _schedule_pump(self) -> None:
        """Plans once this turn of the loop is over, so that requests that come together start together."""
        if not self._pump_scheduled:
            self._pump_scheduled = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Keeps the worker one step ahead, but not for longer than it needs to be."""
        self._pump_scheduled = False
        if self._pump_timer is not None:
            self._pump_timer.cancel()
            self._pump_timer = None
        self._masks.planned()
        if self._core is None or self._group is None or self._lost.is_set() or self._is_broken:
            return
        core, pacing = self._core, self._pacing
        while (
            core.num_in_flight < MAX_STEPS_IN_FLIGHT
            and not pacing.holds_back(core)
            and not self._pump_later(pacing.too_early(core, time.perf_counter()))
            and (plan := core.schedule()) is not None
        ):
            if core.num_in_flight == 1:
                pacing.began(time.perf_counter())
            if not self._send(plan):
                return
            self.metrics.iteration_tokens.observe(float(plan.counts.sum()))
        if self._ahead.more:
            self._plan_ahead(core)
        if (core.num_in_flight or self._ahead.in_flight) and self._watchdog is not None:
            self._watchdog.began()
        now = time.perf_counter()
        for request in core.take_admitted():
            ticket = ticket_of(request)
            self.metrics.scheduled(ticket, now)
            ticket.outbox.add_admitted(ticket.handle, request.num_cached_tokens)

    def _plan_ahead(self, core: Scheduler) -> None:
        """Has the worker do a piece of work that makes later steps faster, if it is time for one."""
        now = time.monotonic()
        if self._ahead.is_due(now, is_idle=core.num_running + core.num_waiting == 0):
            self._send(work_ahead_plan())
            self._ahead.sent(now)

    def _send(self, plan: StepPlan) -> bool:
        """Sends a plan to the worker, which is left where that cannot be done."""
        assert self._group is not None
        try:
            self._group.send_plan(plan)
        except RingError:
            logger.exception("a plan cannot be sent to the worker; leaving it")
            self._leave("a plan could not be sent to the engine-worker")
            return False
        return True

    def _pump_later(self, seconds: float) -> bool:
        """Plans after so long, unless that is now; whether it is later."""
        if seconds < LEAST_SECONDS:
            return False
        self._pump_timer = asyncio.get_running_loop().call_later(seconds, self._pump)
        return True

    def _on_results(self) -> None:
        """Applies every result that has come, plans on, then hands the tokens out."""
        if self._is_broken:
            return
        assert self._group is not None
        assert self._core is not None
        assert self._watchdog is not None
        self._group.clear()
        outputs: list[tuple[StepResult, StepOutput]] = []
        was_ahead = self._ahead.in_flight
        try:
            while (result := self._group.poll_result()) is not None:
                if result.is_last:
                    logger.error("step %d was the worker's last: %s", result.step_id, result.error)
                    self._leave(result.error)
                    break
                if result.step_id == WORK_AHEAD_STEP:
                    self._ahead.finished(result.more_ahead)
                    self._pacing.began(time.perf_counter())
                    continue
                output = self._core.update(result)
                self._masks.advance(output)
                self._pacing.ran(result.execute_us, result.launch_us)
                self._pacing.began(time.perf_counter())
                outputs.append((result, output))
        except (RecordError, RingError, ValueError):
            logger.exception("the worker sent a broken result; leaving it")
            self._leave("the engine-worker sent a broken result")
        if outputs or was_ahead != self._ahead.in_flight:
            self._watchdog.finished(len(outputs), self._core.num_in_flight + self._ahead.in_flight)
        self._masks.plan_with_masks(self._pacing.patience(self._core))
        for result, output in outputs:
            if result.error:
                logger.error("step %d failed: %s", result.step_id, result.error)
                for request in output.ended:
                    logger.error("request %s is quarantined: %s", request.request_id, result.error)
            self._hand_out(result, output)

    def _hand_out(self, result: StepResult, output: StepOutput) -> None:
        now = time.perf_counter()
        self.metrics.step_time.observe(result.execute_us * 1e-6)
        tickets = cast(list[Ticket], [request.owner for request in output.requests])
        self.metrics.tokens(tickets, now)
        touched = set()
        for outbox, mine in by_outbox(tickets).items():
            logprobs: list[tuple[int, TokenLogprobs]] = []
            if output.logprobs:
                logprobs = [(at, output.logprobs[i]) for at, i in enumerate(mine) if i in output.logprobs]
            handles, token_ids = [tickets[i].handle for i in mine], [output.token_ids[i] for i in mine]
            outbox.add_tokens(handles, token_ids, logprobs)
            touched.add(outbox)
        for request, entry in output.prompt_logprobs:
            ticket_of(request).outbox.add_prompt_logprobs(ticket_of(request).handle, entry)
            touched.add(ticket_of(request).outbox)
        for request, state in output.pooled:
            ticket_of(request).outbox.add_pooled_state(ticket_of(request).handle, state)
        for request in output.ended:
            self._finish(request)
            touched.add(ticket_of(request).outbox)
        for outbox in touched:
            outbox.flush(result.step_id)

    def _finish(
        self,
        request: Request,
        status: Code = Code.INTERNAL,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """Tells the outbox of a request that it ended."""
        ticket = ticket_of(request)
        self._settle(request)
        ticket.outbox.add_ended(ticket.handle, request, status, param, retry_after)

    def _settle(self, request: Request) -> None:
        ticket = ticket_of(request)
        if ticket.deadline is not None:
            ticket.deadline.cancel()
        self._masks.forget(request)
        self.metrics.ended(request, ticket, time.perf_counter())

    def _tell_model(self) -> None:
        model = self.model()
        for outbox in self._outboxes:
            outbox.set_model(model)

    def model(self) -> pb.GetModelResponse:
        """Facts about the model and the limits in force; empty but for `ready` before the first worker."""
        facts = self.facts
        if facts is None:
            return pb.GetModelResponse(ready=False)
        return model_message(facts, self._limits(facts), ready=self._core is not None)

    def _limits(self, facts: WorkerFacts) -> EngineLimits:
        config = self._config
        return facts.limits.lowered(
            max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens
        )

    def load(self) -> pb.GetLoadResponse:
        """Current queue lengths and memory use."""
        if self._core is None:
            return pb.GetLoadResponse(num_requests_waiting=len(self._orphans))
        return load_message(self._core)


def _is_same_model(facts: WorkerFacts, others: WorkerFacts) -> bool:
    """Whether a request that was begun with one can go on with the other."""
    return (facts.fingerprint, facts.limits.vocab_size, facts.eos_token_ids) == (
        others.fingerprint,
        others.limits.vocab_size,
        others.eos_token_ids,
    )


def _is_of_scheduler(error: BaseException) -> bool:
    """Whether it went through code of the scheduler, and not of a library on the same event loop alone."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith("scheduler.") for frame, _ in frames)
