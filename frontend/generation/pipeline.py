"""The one pipeline behind both protocols: template, tokenize, check, submit, and see to the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import ParamSpec, TypeVar

from frontend.chat.settings import ConstraintSettings
from frontend.generation.answer import Answer
from frontend.generation.answers import open_answer
from frontend.generation.constraints import Constraints
from frontend.generation.prompts import PromptTokens, is_tokens, read_prompt, read_request
from frontend.generation.request import Conversation, GenerationRequest, TextPrompt
from frontend.generation.submissions import Submissions, check_range
from frontend.metrics import FrontendMetrics
from frontend.replicas.links import SchedulerLinks
from frontend.request_log import RequestLog
from frontend.served_model import ServedModel
from frontend.tracing import FrontendTracing
from pagewire.base.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PagewireError,
    Unavailable,
    Unsupported,
)
from pagewire.scheduler.v1 import scheduler_pb2
from pagewire.wire.tasks import GENERATE, why_no_generation

P = ParamSpec("P")
T = TypeVar("T")

MAX_TOKENIZING = 1024
"""Prompts being tokenized or waiting for it; beyond it new requests are refused."""

_TOKENIZER_THREADS = 4


class GenerationPipeline:
    """Owns the tokenizing threads and counts the requests under way; state per request is the request's.

    Attributes:
        model: what is served.
        link: the streams to the schedulers.
        max_prompt_tokens: the longest prompt taken, or None for what the model's context holds.
        draining: whether new requests are refused because this process is to end.
    """

    def __init__(
        self,
        model: ServedModel,
        link: SchedulerLinks,
        metrics: FrontendMetrics,
        *,
        request_log: RequestLog,
        max_prompt_tokens: int | None = None,
        constraints: ConstraintSettings | None = None,
        tracing: FrontendTracing | None = None,
    ) -> None:
        self.model = model
        self.link = link
        self.max_prompt_tokens = max_prompt_tokens
        self.leaving = False
        self.draining = False
        self.on_drain: Callable[[], None] = lambda: None
        self._request_log = request_log
        self._metrics = metrics
        self._tracing = tracing or FrontendTracing()
        self._threads = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="tokenize")
        self._num_tokenizing = 0
        self._constraints = Constraints(constraints or ConstraintSettings())
        self.num_open = 0
        self._idle = asyncio.Event()
        self._idle.set()
        link.on_change(self._learn_adapters)
        self._learn_adapters()  # the scheduler may have told before the model's text side was loaded

    @property
    def ready(self) -> bool:
        """Whether a request sent now would be served."""
        return self.link.ready and not (self.leaving or self.draining)

    def why_not_ready(self) -> str:
        """For people: why a request sent now would not be served."""
        if self.draining or self.leaving:
            return "this server is shutting down"
        return self.link.why_not_ready()

    @asynccontextmanager
    async def start(self, request: GenerationRequest) -> AsyncIterator[Answer]:
        """Submits a request and, when the context is left for whatever reason, sees to its end.

        Raises:
            InvalidRequest, NotFound: the request cannot succeed as sent.
            Unsupported: the model does not generate.
            Unavailable: no engine is ready, or this frontend is draining.
            Overloaded: too much is waiting.
            DeadlineExceeded: the timeout is over already.
        """
        async with self.admit(request.model, request.timeout) as admitted:
            deadline, facts = admitted.deadline, admitted.facts
            if facts.task not in ("", GENERATE):
                raise Unsupported(why_no_generation(facts.task), param="model")
            prompts, bad_words = await self._read(request, admitted)
            request = await admitted.in_time(self._constraints.apply(self.model, request, prompts))
            for prompt in prompts:
                self._check_length(len(prompt.token_ids))
            self._request_log.submitted(request, prompts)
            if not self.link.ready:  # lost meanwhile
                facts = await admitted.in_time(self._facts())
            submissions = Submissions(
                self.link,
                request,
                deadline=deadline,
                bad_words=bad_words,
                adapter_id=admitted.adapter_id,
            )
            admitted.submitted(submissions, num_prompts=len(prompts))
            try:
                answer = admitted.answer = open_answer(request, prompts, submissions, self.model, facts)
                answer.relaxed = request.relaxed
                yield answer
            finally:
                submissions.close_all()

    @asynccontextmanager
    async def admit(self, model: str, timeout: float | None) -> AsyncIterator[Admitted]:
        """Lets a request in and, when the context is left for whatever reason, counts how it ended. While a
        scheduler or an engine is being replaced, it waits for the next one.

        Raises:
            NotFound: there is no such model.
            Unavailable: no engine is ready, or this frontend is draining.
            DeadlineExceeded: the timeout is over already.
        """
        with self._watched() as admitted:
            if self.draining:
                raise Unavailable("this server is shutting down; send the request again")
            admitted.deadline = _deadline(timeout)
            if self._is_surely_unknown(model):
                self.model.check_name(model)
            admitted.facts = await admitted.in_time(self._facts())
            if model and model not in self.model.all_names:
                await admitted.in_time(self.link.refresh_model())  # another frontend may have loaded it
            self.model.check_name(model)
            admitted.adapter_id = self.model.adapter_id(model)
            yield admitted

    def _is_surely_unknown(self, model: str) -> bool:
        """Whether no news of the scheduler's can make this the name of anything."""
        facts = self.link.model
        return facts is not None and not facts.max_loras and model not in self.model.names

    def _learn_adapters(self) -> None:
        if self.link.model is not None:
            self.model.adapters.learn(self.link.model.adapters)

    def _check_length(self, num_tokens: int) -> None:
        if self.max_prompt_tokens is not None and num_tokens > self.max_prompt_tokens:
            raise InvalidRequest(
                f"the prompt has {num_tokens} tokens; this server takes at most {self.max_prompt_tokens}",
                param="prompt",
            )

    async def _read(
        self, request: GenerationRequest, admitted: Admitted
    ) -> tuple[list[PromptTokens], list[list[int]]]:
        """The prompts' tokens, and those of the bad words. What has no text in it needs no thread."""
        max_tokens = admitted.facts.max_model_len
        if not request.sampling.bad_words and not request.echo and all(map(is_tokens, request.prompts)):
            return read_request(self.model, request, max_tokens)
        return await admitted.in_time(self.in_thread(read_request, self.model, request, max_tokens))

    async def tokenize(self, prompt: TextPrompt | Conversation, max_tokens: int | None = None) -> list[int]:
        """The token ids that generation would use for a prompt.

        Raises:
            InvalidRequest: the template refuses the conversation, or the text is so long that it cannot but
                have more than `max_tokens` tokens; that is found without tokenizing it.
            Overloaded: too many prompts wait.
        """
        read = await self.in_thread(read_prompt, self.model, prompt, max_tokens)
        return list(read.token_ids)

    async def in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Does what is too slow for the event loop.

        Raises:
            Overloaded: too many prompts wait.
        """
        if self._num_tokenizing >= MAX_TOKENIZING:
            raise Overloaded(f"{MAX_TOKENIZING} prompts wait to be tokenized; try again later")
        self._num_tokenizing += 1
        try:
            with self._metrics.tokenize.time():
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self._threads, partial(work, *args, **kwargs))
        finally:
            self._num_tokenizing -= 1

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of some tokens.

        Raises:
            InvalidRequest: an id is out of range.
        """
        vocab_size = self.link.model.vocab_size if self.link.model else self.model.tokenizer.vocab_size
        check_range(token_ids, vocab_size, "token_ids")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads,
            lambda: self.model.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens),
        )

    async def drain(self, timeout: float) -> int:
        """Refuses new requests and waits for the open ones; after `timeout` seconds these end as aborted.
        Those that wait for this frontend's first engine are refused at once.

        Returns:
            How many were.
        """
        self.draining = True
        self.on_drain()
        self.link.expect_no_first_engine()
        if await self.idle_within(timeout):
            return 0
        num_aborted = self.num_open
        self.link.abort_all()
        return num_aborted

    async def idle_within(self, seconds: float) -> bool:
        """Waits until no request is open; whether that was so in time."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Lets the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._constraints.close()

    async def _facts(self) -> scheduler_pb2.GetModelResponse:
        await self.link.back_soon()
        if not self.link.ready or self.link.model is None:
            shutting_down = "this server is shutting down, and has no engine"
            raise Unavailable(shutting_down if self.draining else self.link.why_not_ready())
        return self.link.model

    @contextmanager
    def _watched(self) -> Iterator[Admitted]:
        """Counts a request in and out, with its latencies and outcome."""
        admitted = Admitted()
        self.num_open += 1
        self._idle.clear()
        self._metrics.open_requests.inc()
        error = None
        try:
            yield admitted
        except PagewireError as caught:
            error = caught
            raise
        finally:
            self._metrics.open_requests.dec()
            outcome = admitted.outcome_of(error)
            self._metrics.observe(admitted.began, admitted.first_token_at, outcome)
            self._metrics.inferences.ended(
                outcome,
                began=admitted.began,
                submitted_at=admitted.submitted_at,
                scheduled_at=admitted.scheduled_at,
                num_prompts=admitted.num_prompts,
            )
            if self._tracing.is_on:
                answer = admitted.answer
                self._tracing.answered(
                    outcome,
                    began=admitted.began,
                    submitted_at=admitted.submitted_at,
                    first_token_at=admitted.first_token_at,
                    num_output_tokens=0 if answer is None else answer.usage.completion_tokens,
                )
            self.num_open -= 1
            if self.num_open == 0:
                self._idle.set()


@dataclass(slots=True)
class Admitted:
    """A request that was let in: what holds for it, and what is measured of it.

    Attributes:
        facts: about the model, from the scheduler.
        deadline: event loop time at which the request is to end, or None.
        answer: what it was answered with, once that is open.
        outcome: how it ended, where it has no answer.
        submitted_at: `time.perf_counter` when the scheduler was asked, if it was.
        num_prompts: how many prompts it has.
        adapter_id: of the adapter that it names; 0 for the model itself.
    """

    began: float = field(default_factory=time.perf_counter)
    facts: scheduler_pb2.GetModelResponse = field(default_factory=scheduler_pb2.GetModelResponse)
    deadline: float | None = None
    answer: Answer | None = None
    outcome: str = "cancelled"
    submitted_at: float | None = None
    num_prompts: int = 1
    adapter_id: int = 0
    _submissions: Submissions | None = None

    def submitted(self, submissions: Submissions, *, num_prompts: int) -> None:
        """Notes that the scheduler is being asked."""
        self.submitted_at = time.perf_counter()
        self.num_prompts = num_prompts
        self._submissions = submissions

    async def in_time(self, preparation: Awaitable[T]) -> T:
        """Waits for what is needed before the request can be submitted.

        Raises:
            DeadlineExceeded: the deadline passed before it was there.
        """
        try:
            async with asyncio.timeout_at(self.deadline):
                return await preparation
        except TimeoutError as error:
            raise DeadlineExceeded("the request's deadline passed while it was prepared") from error

    @property
    def first_token_at(self) -> float | None:
        return None if self.answer is None else self.answer.first_token_at

    @property
    def scheduled_at(self) -> float | None:
        """When it was first computed, if it was."""
        first = None if self._submissions is None else self._submissions.first
        return None if first is None else first.admitted_at

    def outcome_of(self, error: PagewireError | None) -> str:
        if error is not None:
            return type(error).__name__
        if self.answer is not None and self.answer.finished is not None:
            return self.answer.finished.reason.value
        return self.outcome


def _deadline(timeout: float | None) -> float | None:
    """Event loop time at which the request is to end."""
    if timeout is None:
        return None
    if timeout <= 0:
        raise DeadlineExceeded("the request's deadline had passed when it arrived")
    return asyncio.get_running_loop().time() + timeout
