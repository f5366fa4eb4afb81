"""The one pipeline behind both protocols: template, tokenize, check, submit, and read the events back."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from frontend.completion import Completion
from frontend.generation_request import Conversation, GenerationRequest, Prompt, TextPrompt, TokenPrompt
from frontend.metrics import FrontendMetrics
from frontend.output_text import OutputText
from frontend.scheduler_link import SchedulerLink
from frontend.served_model import ServedModel
from pagewire.errors import DeadlineExceeded, InvalidRequest, Overloaded, PagewireError, Unavailable
from pagewire.inference.v1 import inference_pb2
from pagewire.sampling_params import SamplingParams
from pagewire.scheduler.v1 import scheduler_pb2

MAX_TOKENIZING = 1024
"""Prompts being tokenized or waiting for it; beyond it new requests are refused."""

_TOKENIZER_THREADS = 4


class GenerationPipeline:
    """Owns the tokenizing threads and counts the requests under way; state per request is the request's.

    Attributes:
        model: what is served.
        link: the stream to the scheduler.
        draining: whether new requests are refused because this process is to end.
    """

    def __init__(self, model: ServedModel, link: SchedulerLink, metrics: FrontendMetrics) -> None:
        self.model = model
        self.link = link
        self.draining = False
        self._metrics = metrics
        self._threads = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="tokenize")
        self._num_tokenizing = 0
        self._num_open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def ready(self) -> bool:
        """Whether a request sent now would be served."""
        return self.link.ready and not self.draining

    @asynccontextmanager
    async def start(self, request: GenerationRequest) -> AsyncIterator[Completion]:
        """Submits a request and, when the context is left for whatever reason, sees to its end.

        Raises:
            InvalidRequest, NotFound: the request cannot succeed as sent.
            Unavailable: no engine is ready, or this frontend is draining.
            Overloaded: too much is waiting.
            DeadlineExceeded: the timeout is over already.
        """
        with self._watched() as watch:
            if self.draining:
                raise Unavailable("this server is shutting down; send the request again")
            self.model.check_name(request.model)
            deadline = _deadline(request.timeout)
            facts = self._facts()
            prompt_ids = await self._prompt_ids(request.prompt, deadline, facts)
            if deadline is not None and asyncio.get_running_loop().time() >= deadline:
                raise DeadlineExceeded("the request's deadline passed before it was submitted")
            open_request = self.link.open(
                request_id=request.request_id,
                prompt_ids=prompt_ids,
                sampling=_to_submit(request.sampling, prompt_ids, facts),
                priority=request.priority,
                deadline=deadline,
            )
            try:
                completion = watch.completion = Completion(
                    open_request,
                    sampling=request.sampling,
                    text=OutputText(self.model.tokenizer, request.sampling),
                    eos_token_ids=frozenset(facts.eos_token_ids),
                    close=self.link.close,
                )
                yield completion
            finally:
                self.link.close(open_request)

    async def tokenize(self, prompt: TextPrompt | Conversation, max_tokens: int | None = None) -> list[int]:
        """The token ids that generation would use for a prompt.

        Raises:
            InvalidRequest: the template refuses the conversation, or the text is so long that it cannot but
                have more than `max_tokens` tokens; that is found without tokenizing it.
            Overloaded: too many prompts wait.
        """
        if self._num_tokenizing >= MAX_TOKENIZING:
            raise Overloaded(f"{MAX_TOKENIZING} prompts wait to be tokenized; try again later")
        self._num_tokenizing += 1
        try:
            with self._metrics.tokenize.time():
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self._threads, self._encode, prompt, max_tokens)
        finally:
            self._num_tokenizing -= 1

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of some tokens.

        Raises:
            InvalidRequest: an id is out of range.
        """
        vocab_size = self.link.model.vocab_size if self.link.model else self.model.tokenizer.vocab_size
        _check_range(token_ids, vocab_size, "token_ids")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads,
            lambda: self.model.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens),
        )

    async def drain(self, timeout: float) -> None:
        """Refuses new requests and waits for the open ones; after `timeout` seconds these end as aborted."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            self.link.abort_all()

    def close(self) -> None:
        """Lets the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _facts(self) -> scheduler_pb2.GetModelResponse:
        if not self.link.ready or self.link.model is None:
            raise Unavailable(self.link.why_not_ready())
        return self.link.model

    async def _prompt_ids(
        self, prompt: Prompt, deadline: float | None, facts: scheduler_pb2.GetModelResponse
    ) -> Sequence[int]:
        if isinstance(prompt, TokenPrompt):
            return prompt.token_ids
        try:
            async with asyncio.timeout_at(deadline):
                return await self.tokenize(prompt, facts.max_model_len)
        except TimeoutError as error:
            raise DeadlineExceeded("the request's deadline passed while it was tokenized") from error

    def _encode(self, prompt: TextPrompt | Conversation, max_tokens: int | None) -> list[int]:
        """Runs in a thread."""
        tokenizer = self.model.tokenizer
        if isinstance(prompt, TextPrompt):
            _check_length(prompt.text, tokenizer.longest_token, max_tokens)
            return tokenizer.encode(prompt.text, add_special_tokens=prompt.add_special_tokens)
        if self.model.template is None:
            raise InvalidRequest(
                "the model has no chat template; send a text prompt instead", param="messages"
            )
        rendered = self.model.template.render(
            prompt.messages, add_generation_prompt=prompt.add_generation_prompt
        )
        _check_length(rendered, tokenizer.longest_token, max_tokens)
        return tokenizer.encode(rendered, add_special_tokens=False)  # the template wrote them

    @contextmanager
    def _watched(self) -> Iterator[_Watch]:
        """Counts a request in and out, with its latencies and outcome."""
        watch = _Watch()
        self._num_open += 1
        self._idle.clear()
        self._metrics.open_requests.inc()
        error = None
        try:
            yield watch
        except PagewireError as caught:
            error = caught
            raise
        finally:
            self._metrics.open_requests.dec()
            self._metrics.observe(watch.began, watch.first_token_at, watch.outcome(error))
            self._num_open -= 1
            if self._num_open == 0:
                self._idle.set()


@dataclass(slots=True)
class _Watch:
    """What is measured of one request."""

    began: float = field(default_factory=time.perf_counter)
    completion: Completion | None = None

    @property
    def first_token_at(self) -> float | None:
        return None if self.completion is None else self.completion.first_token_at

    def outcome(self, error: PagewireError | None) -> str:
        if error is not None:
            return type(error).__name__
        if self.completion is not None and self.completion.finish_reason is not None:
            return self.completion.finish_reason.value
        return "cancelled"


def _deadline(timeout: float | None) -> float | None:
    """Event loop time at which the request is to end."""
    if timeout is None:
        return None
    if timeout <= 0:
        raise DeadlineExceeded("the request's deadline had passed when it arrived")
    return asyncio.get_running_loop().time() + timeout


def _check_range(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidRequest(
            f"{param} has token id {wrong}; ids must be between 0 and {vocab_size - 1}", param=param
        )


def _check_length(text: str, longest_token: int, max_tokens: int | None) -> None:
    """Refuses a text that has too many tokens even if each were the longest there is."""
    if max_tokens is not None and len(text) > max_tokens * longest_token:
        raise InvalidRequest(
            f"the prompt has {len(text)} characters, which is more than the model's context of {max_tokens} "
            "tokens can hold",
            param="prompt",
        )


def _to_submit(
    sampling: SamplingParams, prompt_ids: Sequence[int], facts: scheduler_pb2.GetModelResponse
) -> inference_pb2.SamplingParams:
    """Checks a request against the model and resolves what was left open: the seed and max_tokens.

    Raises:
        InvalidRequest: see the messages.
    """
    if not prompt_ids:
        raise InvalidRequest("the prompt is empty; it must have at least one token", param="prompt")
    room = facts.max_model_len - len(prompt_ids)
    if room < 1:
        raise InvalidRequest(
            f"the prompt has {len(prompt_ids)} tokens; at most {facts.max_model_len - 1} fit, as the model's "
            f"context is {facts.max_model_len} tokens and one is needed for the completion",
            param="prompt",
        )
    _check_range(prompt_ids, facts.vocab_size, "prompt")
    sampling.check_token_ids(facts.vocab_size)
    max_tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
    if sampling.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {sampling.min_tokens}; after a prompt of {len(prompt_ids)} tokens at most "
            f"{max_tokens} can be generated",
            param="min_tokens",
        )
    resolved = inference_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=random.getrandbits(63) if sampling.seed is None else sampling.seed,
        max_tokens=max_tokens,
        min_tokens=sampling.min_tokens,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        logit_bias=sampling.logit_bias,
        allowed_token_ids=sampling.allowed_token_ids,
    )
    _check_single_precision(sampling, resolved)
    return resolved


def _check_single_precision(sampling: SamplingParams, resolved: inference_pb2.SamplingParams) -> None:
    """Refuses values that are in range but not once they are rounded to the wire's 32-bit floats."""
    for name in ("temperature", "top_p", "repetition_penalty"):
        given, rounded = getattr(sampling, name), getattr(resolved, name)
        if math.isinf(rounded) or (rounded == 0 and given > 0 and name != "temperature"):
            raise InvalidRequest(f"{name} is {given}; it must fit a 32-bit float", param=name)
