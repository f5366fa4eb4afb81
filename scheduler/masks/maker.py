"""Computes token masks for constrained requests, in threads.

The event loop reports the tokens a request has gained and takes finished masks. Threads compile constraints,
advance matchers and compute masks; llguidance releases the GIL meanwhile. Compiling has its own thread,
because it may take seconds.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from engine.dispatch.facts import WorkerFacts
from engine.dispatch.sampling import U32Array
from pagewire.base.errors import PagewireError
from pagewire.structured.grammars import Grammars, Matcher
from pagewire.wire.sampling_params import StructuredOutput
from scheduler.request import Request, Status

logger = logging.getLogger(__name__)

# Deeply nested grammars recurse in the compiler; constraints were tried with a quarter of this.
_STACK_BYTES = 16 << 20
_MAX_MASK_THREADS = 4


@dataclass(frozen=True, slots=True)
class MaskOutcome:
    """The result of advancing a request's matcher by its new tokens.

    Attributes:
        request: the request.
        mask: the tokens allowed next; None if the output is complete, or on an error.
        error: why the request cannot continue; None if it can.
    """

    request: Request
    mask: U32Array | None = None
    error: PagewireError | None = None


@dataclass(slots=True)
class _Task:
    request: Request
    constraint: StructuredOutput
    token_ids: Sequence[int]
    matcher: Matcher | None = None
    is_awaited: bool = False


_Queue = SimpleQueue[_Task | None]


class MaskMaker:
    """The matchers of all open constrained requests of one model.

    Call it on the event loop's thread only. Its own threads start with the first request and do not keep the
    process alive.

    Args:
        facts: the worker's facts about the model.
        wake: called, from any thread, when `take` has an outcome.

    Attributes:
        num_under_way: outcomes that are not taken yet.
        num_awaited: those of them that follow a sampled token, rather than begin a request.
    """

    def __init__(self, facts: WorkerFacts, wake: Callable[[], None]) -> None:
        self._grammars = Grammars(facts.model, facts.limits.vocab_size, facts.eos_token_ids)
        self._wake = wake
        self._matchers: dict[Request, Matcher | None] = {}
        self._done: deque[tuple[_Task, MaskOutcome]] = deque()
        self._to_compile: _Queue = SimpleQueue()
        self._to_advance: _Queue = SimpleQueue()
        self._num_threads = 0
        self.num_under_way = self.num_awaited = 0

    @property
    def num_open(self) -> int:
        """Requests that were begun and not forgotten yet."""
        return len(self._matchers)

    def begin(self, request: Request) -> None:
        """Starts computing the first mask of a request, which may have output already."""
        assert request.constraint is not None
        if self._num_threads == 0:
            self._start_threads()
        self._matchers[request] = None
        matcher = self._grammars.matcher(request.constraint)
        output = request.token_ids[request.num_prompt_tokens :].tolist()
        task = _Task(request, request.constraint, output, matcher)
        self.num_under_way += 1
        (self._to_compile if matcher is None else self._to_advance).put(task)

    def prepare(self) -> None:
        """Loads the tokenizer in a thread, so that the first constrained request does not wait for it."""
        threading.Thread(target=self._prepare, name="vocabulary", daemon=True).start()

    def _prepare(self) -> None:
        try:
            self._grammars.load()
        except PagewireError as error:
            logger.info("requests with structured output will be refused: %s", error.message)

    def check(self, constraint: StructuredOutput) -> None:
        """Compiles a constraint and blocks meanwhile. Call it only while nothing is under way.

        Raises:
            PagewireError: the constraint cannot be served.
        """
        assert self.num_under_way == 0
        self._grammars.compile(constraint)

    def advance(self, request: Request) -> None:
        """Starts computing the next mask of a request that has just gained a token."""
        assert request.constraint is not None
        matcher = self._matchers[request]
        assert matcher is not None, "it was sampled without a mask"
        self.num_under_way += 1
        self.num_awaited += 1
        task = _Task(request, request.constraint, request.token_ids[-1:].tolist(), matcher, is_awaited=True)
        self._to_advance.put(task)

    def forget(self, request: Request) -> None:
        """Drops the matcher of a request that has ended."""
        self._matchers.pop(request, None)

    def take(self) -> list[MaskOutcome]:
        """Takes the finished outcomes of requests that have not ended."""
        outcomes = []
        while self._done:
            task, outcome = self._done.popleft()
            self.num_under_way -= 1
            self.num_awaited -= task.is_awaited
            if task.request.status is Status.ENDED:
                self.forget(task.request)
            else:
                self._matchers[task.request] = task.matcher
                outcomes.append(outcome)
        return outcomes

    def close(self) -> None:
        """Ends the threads, each after its current task, and the process that tries constraints."""
        self._to_compile.put(None)
        for _ in range(self._num_threads - 1):
            self._to_advance.put(None)
        self._matchers.clear()
        self._grammars.close()

    def _start_threads(self) -> None:
        num_advancing = min(os.cpu_count() or 1, _MAX_MASK_THREADS)
        default = threading.stack_size(_STACK_BYTES)
        try:
            self._start("grammars", self._to_compile, self._compile)
            for index in range(num_advancing):
                self._start(f"masks-{index}", self._to_advance, self._advance)
        finally:
            threading.stack_size(default)
        self._num_threads = 1 + num_advancing

    def _start(self, name: str, queue: _Queue, work: Callable[[_Task], None]) -> None:
        threading.Thread(target=self._work, name=name, args=(queue, work), daemon=True).start()

    def _work(self, queue: _Queue, work: Callable[[_Task], None]) -> None:
        while (task := queue.get()) is not None:
            try:
                work(task)
            except PagewireError as error:
                self._finish(task, MaskOutcome(task.request, error=error))
            except BaseException as error:  # a panic of llguidance's is no Exception
                logger.exception("no mask could be made for %s", task.request.request_id)
                unforeseen = PagewireError(f"no mask could be made: {error!r}")
                self._finish(task, MaskOutcome(task.request, error=unforeseen))

    def _compile(self, task: _Task) -> None:
        task.matcher = self._grammars.compile(task.constraint)
        self._to_advance.put(task)

    def _advance(self, task: _Task) -> None:
        assert task.matcher is not None
        task.matcher.advance(task.token_ids)
        self._finish(task, MaskOutcome(task.request, mask=task.matcher.mask()))

    def _finish(self, task: _Task, outcome: MaskOutcome) -> None:
        self._done.append((task, outcome))
        self._wake()
