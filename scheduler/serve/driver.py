"""Drives the engine: attaches to the worker, plans one step ahead of it and passes results to the outboxes.

One object on the event loop; nothing here blocks. Plans are sent shortly before the worker needs them (see
pacing.py). The worker's eventfd signals results, and its control socket closes when it dies. "The worker" may
be a group of ranks that share a model (see group.py); if one of them is lost, all are.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from engine.dispatch.control import ADAPTER_STEP, WORK_AHEAD_STEP, is_warm, rank_socket, steps_in_flight
from engine.dispatch.facts import WorkerFacts
from engine.dispatch.limits import EngineLimits
from engine.dispatch.link import Rank, WorkerLink
from engine.dispatch.records import StepPlan, StepResult, TokenLogprobs
from engine.dispatch.ring import RingError
from engine.dispatch.sampling import RecordError
from pagewire.base.errors import Code, Overloaded, PagewireError, Unavailable, Unsupported
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from pagewire.telemetry.logs import about
from pagewire.telemetry.spans import SpanWriter
from scheduler.config import SchedulerConfig, module_of
from scheduler.core import Scheduler
from scheduler.masks.relay import LEAST_SECONDS, MaskRelay
from scheduler.request import EndReason, Request
from scheduler.serve.adapters import AdapterManager
from scheduler.serve.cache_feed import CacheChanges, CacheFeed
from scheduler.serve.metrics import SchedulerMetrics
from scheduler.serve.observation import Observer
from scheduler.serve.outbox import WORKER_LOST, Outbox, Ticket, by_outbox, ticket_of
from scheduler.serve.status import load_message, model_message
from scheduler.serve.timelines import Timelines
from scheduler.serve.tracing import trace_id_of, write_spans
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
        facts: the attached worker's facts; the last one's while none is attached; None before the first.
        metrics: the scheduler's metrics.
        attached, detached: events that are set while an engine is attached, and while none is.
        timelines: what happened to open requests and the last ones that ended.
        cache_feed: tells streams, and others, which blocks are cached.
    """

    def __init__(self, config: SchedulerConfig, spans: SpanWriter | None = None) -> None:
        """`spans` takes the spans of traced requests; None if there is no tracing."""
        self._config = config
        self._batch_delay = config.batch_delay
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
        self._cache_streams: dict[Outbox, tuple[CacheChanges, Callable[[], int]]] = {}
        self.cache_feed = CacheFeed(self._tell_cache)
        self._observers: set[Observer] = set()
        self._pump_scheduled = False
        self._pump_timer: asyncio.TimerHandle | None = None
        self._masks = MaskRelay(self._apply_mask, self._pump)
        self._pacing = Pacing()
        self._most_in_flight = steps_in_flight(1)
        self.facts: WorkerFacts | None = None
        self.attached, self.detached = asyncio.Event(), asyncio.Event()
        self.detached.set()
        self.metrics = SchedulerMetrics(lambda: self._core, config.batching_strategy, lambda: self.facts)
        self.timelines = Timelines(config.request_history)
        self._spans = spans
        self.adapters = AdapterManager(
            dict(module_of(each) for each in config.lora_modules),
            end=self._end_with,
            changed=self._tell_model,
            pump=self._schedule_pump,
        )
        self.metrics.adapters = self.adapters

    @property
    def core(self) -> Scheduler | None:
        """The scheduler core of the attached worker; None while none is attached."""
        return self._core

    async def run(self) -> None:
        """Attaches to the worker, and again whenever it is lost, until cancelled.

        Raises:
            Exception: a callback of the scheduler raised it. The state may be inconsistent, so the process
                has to end; frontends and workers survive that.
        """
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_exception)
        self._broken = loop.create_future()
        self.adapters.failed = loop.create_future()
        serving = asyncio.create_task(self._serve())
        try:
            ends = (serving, self._broken, self.adapters.failed)
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self._broken.done():
                raise self._broken.result()
            if self.adapters.failed.done():
                self.adapters.failed.result()
            await serving
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            if self._group is not None:
                self._group.close()
            self._masks.close()
            self.cache_feed.close()
            self.adapters.close()

    async def _serve(self) -> None:
        config = self._config
        while True:
            link = await attach(config.worker_socket, config.step_timeout, one_hangs=self._one_hangs)
            self._attach(link)
            await self._lost.wait()
            self._detach()

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Ends `run` with an exception raised by a callback of the scheduler; logs any other."""
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
        self._most_in_flight = steps_in_flight(facts.num_stages)
        self._ahead = WorkAhead(facts.more_ahead)
        self._one_hangs = False
        self._core = Scheduler(self._limits(facts), self._config.core(), num_stages=facts.num_stages)
        self._pacing = Pacing(facts.num_stages)
        self._core.on_preempted = _note_preempted
        self.cache_feed.attach(self._core)
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
        self.adapters.attach(self._core, facts)
        orphans, self._orphans = self._orphans, []
        now = time.perf_counter()
        for request in orphans:
            ticket_of(request).note(now, "worker attached", f"pid {group.ranks[0].worker_pid}")
            self._resume(request)
        self._tell_model()
        self._pump()
        loop.call_later(_IDLE_SECONDS, self._prepare_masks)

    def _describe_oldest(self) -> str:
        """A readable description of the worker's current work, for logs and errors."""
        if self._core is not None and self._core.num_in_flight:
            return self._core.describe_oldest()
        return "work ahead of steps"

    def _on_worker_gone(self, rank: Rank) -> None:
        """Applies the results of a rank that died, because those steps did not kill it, and detaches."""
        assert self._group is not None
        self._lost.set()
        self._on_results()
        self._leave(f"{self._group.name_of(rank)} died")

    def _leave(self, cause: str, one_hangs: bool = False) -> None:
        """Makes `_serve` detach from a lost worker. The first cause is kept. `one_hangs`: see `attach`."""
        self._cause = self._cause or cause
        self._one_hangs |= one_hangs
        self._lost.set()

    def _detach(self) -> None:
        """Detaches from a lost worker. Its requests keep their tokens and wait for the next worker."""
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
        now = time.perf_counter()
        for request in self._orphans + quarantined:
            ticket_of(request).note(now, WORKER_LOST, self._cause)
        for request in quarantined:
            _log_quarantine(request, self._cause)
            self._finish(request)
            ticket_of(request).outbox.flush(0)
        self.adapters.detach()
        self.metrics.retire(self._core)
        self.metrics.num_worker_losses += 1
        self._group, self._core = None, None
        self.cache_feed.attach(None)
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
        """Ends all waiting requests, because the new worker serves another model: it has another tokenizer,
        or would continue the output of a different model.
        """
        self._masks.close()
        for request in list(self._orphans):
            self._end(request, EndReason.ERROR, "the server has changed its model; submit the request again")
            self._finish(request, Code.UNAVAILABLE)
            ticket_of(request).outbox.flush(0)

    def require_runtime_lora(self) -> None:
        """Raises:
        Unsupported: adapters may not be loaded while the service runs.
        """
        if not self._config.allow_runtime_lora:
            raise Unsupported("adapters are fixed here; start the service with --allow-runtime-lora")

    def subscribe(self, outbox: Outbox) -> None:
        """Sends this outbox the model's facts, now and whenever they change."""
        self._outboxes.add(outbox)
        outbox.set_model(self.model())

    def watch_cache(self, outbox: Outbox, num_own_requests: Callable[[], int]) -> None:
        """Tells this outbox what is cached and how many requests there are, now and whenever it changes.

        Args:
            num_own_requests: how many of the requests were submitted on the outbox's stream.
        """
        if outbox not in self._cache_streams:
            self._cache_streams[outbox] = self.cache_feed.subscribe(), num_own_requests

    def _tell_cache(self) -> None:
        core = self._core
        num_requests = len(self._orphans) if core is None else core.num_running + core.num_waiting
        for outbox, (changes, num_own) in self._cache_streams.items():
            if not outbox.take_cache(partial(changes.take, num_requests, num_own())):
                self.cache_feed.touch()

    def unsubscribe(self, outbox: Outbox, requests: Iterable[Request]) -> None:
        """Ends a stream: aborts its requests, which frees their blocks at once."""
        self._outboxes.discard(outbox)
        watched = self._cache_streams.pop(outbox, None)
        if watched is not None:
            self.cache_feed.unsubscribe(watched[0])
        for request in list(requests):
            self.abort(request)

    def submit(
        self, request: Request, ticket: Ticket, timeout: float | None, *, resumed: bool = False
    ) -> None:
        """Accepts a request; its events go to the ticket's outbox.

        Raises:
            PagewireError: the request is refused: it is invalid, the queue is full, its deadline is too
                close, or no engine was ever attached.
        """
        self.adapters.check(request.adapter_id)
        if self._core is None:
            self._hold(request, resumed)
        else:
            refused = self._core.add(request, resumed=resumed, timeout=timeout)
            if refused is not None:
                self.metrics.refused(Code.RESOURCE_EXHAUSTED.name.lower())
                self._finish(refused, Code.RESOURCE_EXHAUSTED, retry_after=self._core.retry_after(refused))
                ticket_of(refused).outbox.flush(0)
        self.timelines.opened(request)
        self.cache_feed.touch()
        self.adapters.opened(request)
        if self._batch_delay is not None:
            asyncio.get_running_loop().call_later(self._batch_delay, self._on_overdue, request)
        if request.constraint is not None:
            assert self.facts is not None
            self._masks.begin(request, self.facts)
        if timeout is not None:
            loop = asyncio.get_running_loop()
            ticket.deadline = loop.call_later(timeout, self._expire, request)
        self._schedule_pump()

    def _hold(self, request: Request, resumed: bool) -> None:
        """Queues a request that arrives while no engine is attached, together with the lost worker's
        requests. Its frontend may not know of the loss yet, or resumes the stream of an earlier scheduler.

        Raises:
            Unavailable: no engine was ever attached.
            Overloaded: too many requests wait for the next engine.
        """
        if self.facts is None:
            raise Unavailable("no engine is attached; try again later")
        if not resumed and len(self._orphans) >= self._config.max_num_waiting:
            raise Overloaded(f"{len(self._orphans)} requests wait for the next engine; try again later")
        self._orphans.append(request)

    def _prepare_masks(self) -> None:
        """Loads the tokenizer once no request is open, because loading it delays running requests."""
        if self._core is None or self._masks.is_open:
            return
        if self._core.num_running or self._core.num_waiting:
            asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._prepare_masks)
        else:
            assert self.facts is not None
            self._masks.prepare(self.facts)

    def _apply_mask(self, outcome: MaskOutcome) -> None:
        """Unblocks a request whose mask is ready, or ends one that is complete or cannot continue."""
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

    def abort(self, request: Request, reason: EndReason = EndReason.ABORT) -> None:
        """Ends a request at once, without an event in its outbox."""
        if self._end(request, reason):
            self._settle(request)
            self._schedule_pump()

    def _on_overdue(self, request: Request) -> None:
        """A request has waited as long as it may for others to fill its batch, if it still waits."""
        if self._core is not None:
            self._core.overdue(request)
            self._schedule_pump()

    def _end_with(self, requests: Sequence[Request], error: PagewireError) -> None:
        for request in requests:
            if self._end(request, EndReason.ERROR, error.message):
                self._finish(request, error.code, error.param)
                ticket_of(request).outbox.flush(0)

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
        """Plans after this iteration of the event loop, so that requests that arrive together start
        together.
        """
        if not self._pump_scheduled:
            self._pump_scheduled = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Plans and sends steps up to `steps_in_flight`, each no earlier than `Pacing` allows."""
        self._pump_scheduled = False
        if self._pump_timer is not None:
            self._pump_timer.cancel()
            self._pump_timer = None
        self._masks.planned()
        if self._core is None or self._group is None or self._lost.is_set() or self._is_broken:
            return
        core, pacing = self._core, self._pacing
        while (
            core.num_in_flight < self._most_in_flight
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
        self._plan_adapters()
        others = self._ahead.in_flight or self.adapters.in_flight
        if (core.num_in_flight or others) and self._watchdog is not None:
            self._watchdog.began()
        now = time.perf_counter()
        for request in core.take_admitted():
            ticket = ticket_of(request)
            self.metrics.scheduled(ticket, now)
            ticket.outbox.add_admitted(ticket.handle, request.num_cached_tokens)

    def _plan_ahead(self, core: Scheduler) -> None:
        """Sends the worker a piece of work ahead (see work_ahead.py) if one is due."""
        now = time.monotonic()
        if self._ahead.is_due(now, is_idle=core.num_running + core.num_waiting == 0):
            self._send(work_ahead_plan())
            self._ahead.sent(now)

    def _plan_adapters(self) -> None:
        """Sends the workers a piece of work with adapters if one is due, or comes back when one is."""
        plan = self.adapters.next_plan(time.monotonic())
        if plan is not None:
            self._send(plan)
        elif (due := self.adapters.next_at()) is not None:
            asyncio.get_running_loop().call_later(max(0.0, due - time.monotonic()), self._schedule_pump)

    def _send(self, plan: StepPlan) -> bool:
        """Sends a plan to the worker. If that fails, detaches from the worker and returns False."""
        assert self._group is not None
        try:
            self._group.send_plan(plan)
        except RingError:
            logger.exception("a plan cannot be sent to the worker; leaving it")
            self._leave("a plan could not be sent to the engine-worker")
            return False
        return True

    def _pump_later(self, seconds: float) -> bool:
        """Schedules `_pump` after `seconds`. Returns False, and schedules nothing, if that is now."""
        if seconds < LEAST_SECONDS:
            return False
        self._pump_timer = asyncio.get_running_loop().call_later(seconds, self._pump)
        return True

    def _on_results(self) -> None:
        """Applies all results that came, plans the next step, then passes tokens to the outboxes."""
        if self._is_broken:
            return
        assert self._group is not None
        assert self._core is not None
        assert self._watchdog is not None
        self._group.clear()
        outputs: list[tuple[StepResult, StepOutput]] = []
        was_ahead = self._ahead.in_flight + self.adapters.in_flight
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
                if result.step_id == ADAPTER_STEP:
                    self.adapters.finished(result)
                    self._pacing.began(time.perf_counter())
                    continue
                work = self._core.oldest_work
                output = self._core.update(result)
                for observer in self._observers:
                    observer.step(result, work, self._group.execute_us or [result.execute_us])
                self._masks.advance(output)
                self._pacing.ran(result.execute_us, result.launch_us)
                self._pacing.began(time.perf_counter())
                outputs.append((result, output))
        except (RecordError, RingError, ValueError):
            logger.exception("the worker sent a broken result; leaving it")
            self._leave("the engine-worker sent a broken result")
        is_ahead = self._ahead.in_flight + self.adapters.in_flight
        if outputs or was_ahead != is_ahead:
            self._watchdog.finished(len(outputs), self._core.num_in_flight + is_ahead)
        self._masks.plan_with_masks(self._pacing.patience(self._core))
        for result, output in outputs:
            if result.error:
                logger.error("step %d failed: %s", result.step_id, result.error)
                for request in output.ended:
                    _log_quarantine(request, result.error)
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
        """Cleans up after a request that ended and adds the event to its outbox."""
        ticket = ticket_of(request)
        self._settle(request)
        ticket.outbox.add_ended(ticket.handle, request, status, param, retry_after)

    def _settle(self, request: Request) -> None:
        ticket = ticket_of(request)
        if ticket.deadline is not None:
            ticket.deadline.cancel()
        self._masks.forget(request)
        self.cache_feed.touch()
        now = time.perf_counter()
        self.metrics.ended(request, ticket, now)
        self.timelines.ended(request, now)
        self.adapters.ended(request)
        if ticket.trace is not None and self._spans is not None:
            write_spans(self._spans, request, ticket, now)

    def _tell_model(self) -> None:
        model = self.model()
        for outbox in self._outboxes:
            outbox.set_model(model)

    def model(self) -> pb.GetModelResponse:
        """Facts about the model and the limits in force; empty but for `ready` before the first worker."""
        facts = self.facts
        if facts is None:
            return pb.GetModelResponse(ready=False)
        ready = self._core is not None and self.adapters.is_settled
        message = model_message(facts, self._limits(facts), ready=ready)
        message.adapters.extend(self.adapters.messages())
        message.allows_runtime_lora = self._config.allow_runtime_lora
        return message

    def _limits(self, facts: WorkerFacts) -> EngineLimits:
        config = self._config
        return facts.limits.lowered(
            max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens
        )

    @contextmanager
    def observed_by(self, observer: Observer) -> Iterator[None]:
        """Tells an observer what happens."""
        self._observers.add(observer)
        try:
            with observer.measuring(self.metrics):
                yield
        finally:
            self._observers.discard(observer)

    def load(self) -> pb.GetLoadResponse:
        """Current queue lengths and memory use."""
        if self._core is None:
            return pb.GetLoadResponse(num_requests_waiting=len(self._orphans))
        return load_message(self._core)


def _note_preempted(request: Request) -> None:
    ticket_of(request).note(time.perf_counter(), "preempted")


def _log_quarantine(request: Request, cause: str) -> None:
    logger.error(
        "request %s is quarantined: %s",
        request.request_id,
        cause,
        extra=about(request.request_id, trace_id_of(ticket_of(request).trace)),
    )


def _is_same_model(facts: WorkerFacts, others: WorkerFacts) -> bool:
    """Whether a request that started on one of these workers can continue on the other."""
    return (facts.fingerprint, facts.limits.vocab_size, facts.eos_token_ids) == (
        others.fingerprint,
        others.limits.vocab_size,
        others.eos_token_ids,
    )


def _is_of_scheduler(error: BaseException) -> bool:
    """Whether code of the scheduler is in the traceback, rather than only libraries on the same loop."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith("scheduler.") for frame, _ in frames)
