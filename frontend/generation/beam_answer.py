"""An answer that is searched for: one-token requests, whose blocks the prefix cache shares among beams."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from frontend.generation.answer import Answer, PromptProgress, Sink
from frontend.generation.beam_search import BeamSearcher, Candidates, Hypothesis
from frontend.generation.events import Delta, Event, Finished, FinishReason, PositionLogprobs, Usage
from frontend.generation.open_request import OpenRequest, Wakeup
from frontend.generation.output_text import whole_text
from frontend.generation.prompts import PromptTokens
from frontend.generation.request import GenerationRequest
from frontend.generation.submissions import Submissions
from frontend.text.tokenizer import TextTokenizer
from pagewire.base.errors import Unavailable
from pagewire.inference.v1 import inference_pb2
from pagewire.scheduler.v1 import scheduler_pb2
from pagewire.wire.ended_messages import error_in


@dataclass(slots=True)
class _Search:
    """One prompt's.

    Attributes:
        searcher: decides.
        sampling: what each one-token request is sampled with.
        prompt: how far the prompt is known; its lead is the first request.
    """

    searcher: BeamSearcher
    sampling: inference_pb2.SamplingParams
    prompt: PromptProgress


class BeamAnswer(Answer):
    """Everything comes at the end, as only then it is known."""

    def __init__(
        self,
        request: GenerationRequest,
        prompts: Sequence[PromptTokens],
        resolved: Sequence[inference_pb2.SamplingParams],
        *,
        submissions: Submissions,
        tokenizer: TextTokenizer,
        eos_token_ids: frozenset[int],
    ) -> None:
        """Submits every prompt's first request.

        Raises:
            Unavailable, Overloaded: see `SchedulerLinks.open`.
        """
        super().__init__(request.request_id)
        self._request = request
        self._submissions = submissions
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._wakeups = [Wakeup() for _ in prompts]
        self._searches = [
            self._begin(number, prompt, message)
            for number, (prompt, message) in enumerate(zip(prompts, resolved, strict=True))
        ]
        self._first_token_at: float | None = None
        self._num_output_tokens = 0

    def _begin(self, number: int, prompt: PromptTokens, message: inference_pb2.SamplingParams) -> _Search:
        sampling = self._request.sampling
        searcher = BeamSearcher(sampling, eos_token_ids=self._eos_token_ids, max_tokens=message.max_tokens)
        one_token = inference_pb2.SamplingParams(
            temperature=0,
            seed=0,
            max_tokens=1,
            ignore_eos=True,
            logprobs=max(searcher.num_candidates, sampling.logprobs or 0),
        )
        first = inference_pb2.SamplingParams()
        first.CopyFrom(one_token)
        if sampling.prompt_logprobs is not None:
            first.prompt_logprobs = sampling.prompt_logprobs
        lead = self._submissions.open(prompt.token_ids, first, self._wakeups[number])
        progress = PromptProgress(
            number,
            prompt,
            lead,
            wants_logprobs=sampling.prompt_logprobs is not None,
            told=not self._request.wants_prompts,
        )
        return _Search(searcher, one_token, progress)

    @property
    def first_token_at(self) -> float | None:
        return self._first_token_at

    @property
    def usage(self) -> Usage:
        leads = [search.prompt.lead for search in self._searches]
        return Usage(
            sum(len(lead.prompt_ids) for lead in leads),
            sum(lead.num_cached_tokens or 0 for lead in leads),
            self._num_output_tokens,
        )

    async def rounds(self, sink: Sink | None = None) -> AsyncGenerator[list[Event], None]:
        tasks = [asyncio.create_task(self._run(search)) for search in self._searches]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        events: list[Event] = []
        for search in self._searches:
            events += search.prompt.read()
            events += self._best(search)
        self.finished = next(event for event in events if isinstance(event, Finished))
        yield events

    async def _run(self, search: _Search) -> None:
        searcher, wakeup = search.searcher, self._wakeups[search.prompt.index]
        requests = [search.prompt.lead]
        while True:
            while any(request.ended is None for request in requests):
                await wakeup.wait()
            searcher.advance([_candidates(request) for request in requests])
            if self._first_token_at is None:
                self._first_token_at = time.perf_counter()
            if searcher.is_over:
                return
            prompt_ids = search.prompt.prompt.token_ids
            requests = [
                self._submissions.open([*prompt_ids, *beam.token_ids], search.sampling, wakeup)
                for beam in searcher.beams
            ]

    def _best(self, search: _Search) -> list[Delta | Finished]:
        sampling, lead = self._request.sampling, search.prompt.lead
        first = search.prompt.index * sampling.n
        events: list[Delta | Finished] = []
        for index, found in enumerate(search.searcher.best[: sampling.n], first):
            token_ids = list(found.beam.token_ids)
            self._num_output_tokens += len(token_ids)
            usage = Usage(len(lead.prompt_ids), lead.num_cached_tokens or 0, len(token_ids))
            events.append(self._delta(found, usage, index))
            events.append(self._end(found, usage, index))
        return events

    def _delta(self, found: Hypothesis, usage: Usage, index: int) -> Delta:
        sampling, token_ids = self._request.sampling, list(found.beam.token_ids)
        whole = whole_text(self._tokenizer, sampling, token_ids, stopped=found.stopped)
        logprobs = []
        if sampling.logprobs is not None:
            logprobs = [
                PositionLogprobs(token_id, logprob, list(candidates[: sampling.logprobs]))
                for token_id, (logprob, candidates) in zip(token_ids, found.beam.steps, strict=True)
            ]
        if self._request.new_parser is None:
            return Delta(token_ids, whole, logprobs, usage, index=index)
        part = self._request.new_parser().push(whole, last=True)
        return Delta(token_ids, part.content, logprobs, usage, index, part.reasoning, part.tool_calls)

    def _end(self, found: Hypothesis, usage: Usage, index: int) -> Finished:
        if not found.stopped:
            return Finished(FinishReason.LENGTH, usage, index=index, score=found.score)
        last = found.beam.token_ids[-1]
        stop_token_id = None if last in self._eos_token_ids else last
        return Finished(FinishReason.STOP, usage, stop_token_id=stop_token_id, index=index, score=found.score)


def _candidates(request: OpenRequest) -> Candidates:
    """What a one-token request found.

    Raises:
        PagewireError: it failed.
    """
    ended = request.ended
    assert ended is not None
    if ended.reason == scheduler_pb2.END_REASON_ERROR:
        raise error_in(ended)
    _, logprobs = request.take()
    if not logprobs:
        raise Unavailable("the search was ended before it was complete; send the request again")
    return list(zip(logprobs[0].top_ids, logprobs[0].top_logprobs, strict=True))
