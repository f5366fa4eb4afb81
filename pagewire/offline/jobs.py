"""Prompts under way offline: from the scheduler's requests to what `LLM` returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from engine.dispatch import records
from engine.dispatch.facts import WorkerFacts
from frontend.generation.beam_search import BeamSearcher, Candidates, Hypothesis
from frontend.generation.output_text import OutputText, whole_text
from frontend.generation.prompts import bad_word_ids
from frontend.generation.ranked_answer import mean_logprob
from frontend.text.tokenizer import TextTokenizer
from pagewire.base.errors import InvalidRequest, PagewireError
from pagewire.offline.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from pagewire.offline.prompts import OfflinePrompt
from pagewire.wire.sampling_params import SamplingParams, seed_of_completion
from scheduler.request import EndReason, Request
from scheduler.serve.intake import make_request

Piece = tuple[int, str, list[int], str | None, RequestOutput | None]
"""The fields of a `StreamOutput` but the first."""


class Job(ABC):
    """One prompt. It owns the requests that it is made of, and is their `owner`, or their owner's.

    Attributes:
        output: what it comes to; complete once all its requests have ended.
        requests: those to begin with.
    """

    def __init__(
        self,
        output: RequestOutput,
        sampling: SamplingParams,
        tokenizer: TextTokenizer,
        facts: WorkerFacts,
        cache_salt: str,
        adapter_id: int,
    ) -> None:
        self.output = output
        self.requests: list[Request] = []
        self._sampling = sampling
        self._tokenizer = tokenizer
        self._facts = facts
        self._cache_salt = cache_salt
        self._adapter_id = adapter_id
        if sampling.prompt_logprobs is not None:
            output.prompt_logprobs = [None]

    @property
    def watches(self) -> bool:
        """Whether `catch_up` has anything to look for."""
        return bool(self._sampling.stop)

    def add_prompt_logprobs(self, entry: records.PromptLogprobs) -> None:
        """Takes more of the prompt's log probabilities; each comes once, in order."""
        assert self.output.prompt_logprobs is not None
        for logprob, ids, values in zip(
            entry.logprobs.tolist(), entry.top_ids.tolist(), entry.top_logprobs.tolist(), strict=True
        ):
            self.output.prompt_logprobs.append(TokenLogprobs(logprob, dict(zip(ids, values, strict=True))))

    @abstractmethod
    def add_logprobs(self, request: Request, entry: records.TokenLogprobs) -> None:
        """Takes the log probabilities of the token that a request just generated."""

    def catch_up(self, request: Request) -> bool:
        """Looks for stop strings in what a request has generated; True if one ended it."""
        return False

    def pieces(self) -> list[Piece]:
        """What was generated since the last call. Of completions that are ranked, that is everything at the
        end."""
        return [
            (each.index, each.text, each.token_ids, each.finish_reason, self.output)
            for each in self.output.outputs
        ]

    @abstractmethod
    def ended(self, request: Request) -> list[Request]:
        """Takes the end of a request; returns those to run next.

        Raises:
            PagewireError: it failed.
        """


def open_job(
    request_id: str,
    prompt: OfflinePrompt,
    sampling: SamplingParams,
    tokenizer: TextTokenizer,
    facts: WorkerFacts,
    adapter_id: int = 0,
) -> Job:
    """The job of a prompt, computed with an adapter if `adapter_id` is not 0.

    Raises:
        InvalidRequest: a value does not suit the model.
    """
    if sampling.max_tokens == 0 and sampling.prompt_logprobs is None:
        raise InvalidRequest(
            "max_tokens is 0; it must be at least 1 unless prompt_logprobs is set", param="max_tokens"
        )
    output = RequestOutput(request_id, prompt.text, prompt.token_ids, [])
    kind = SamplingJob if sampling.beam_search is None else SearchJob
    return kind(output, sampling, tokenizer, facts, prompt.cache_salt, adapter_id)


class SamplingJob(Job):
    """`n` completions, or the best `n` of `best_of`."""

    def __init__(
        self,
        output: RequestOutput,
        sampling: SamplingParams,
        tokenizer: TextTokenizer,
        facts: WorkerFacts,
        cache_salt: str,
        adapter_id: int,
    ) -> None:
        super().__init__(output, sampling, tokenizer, facts, cache_salt, adapter_id)
        ranked = sampling.best_of not in (None, sampling.n)
        if ranked:
            sampling = replace(sampling, logprobs=sampling.logprobs or 0)
        bad_words = bad_word_ids(tokenizer, sampling.bad_words)
        self._ranked = ranked
        self._samples = [
            _Sample(
                make_request(
                    f"{output.request_id}-{number}" if number else output.request_id,
                    output.prompt_token_ids,
                    _of_sample(sampling, number),
                    facts,
                    owner=self,
                    bad_words=bad_words,
                    cache_salt=cache_salt,
                    group=output.request_id,
                    part=number,
                    adapter_id=adapter_id,
                ),
                sampling,
                OutputText(tokenizer, sampling),
                facts.eos_token_ids,
            )
            for number in range(sampling.best_of or sampling.n)
        ]
        self._by_request = {id(sample.request): sample for sample in self._samples}
        self._num_open = len(self._samples)
        self.requests = [sample.request for sample in self._samples]

    def add_logprobs(self, request: Request, entry: records.TokenLogprobs) -> None:
        top = dict(zip(map(int, entry.top_ids), map(float, entry.top_logprobs), strict=True))
        logprobs = self._by_request[id(request)].completion.logprobs
        assert logprobs is not None
        logprobs.append(TokenLogprobs(entry.logprob, top))

    def catch_up(self, request: Request) -> bool:
        return self.watches and self._by_request[id(request)].catch_up()

    def pieces(self) -> list[Piece]:
        if self._ranked:
            return super().pieces()
        whole = self.output if self._num_open == 0 else None
        pieces = [(number, *sample.news()) for number, sample in enumerate(self._samples)]
        told = [piece for piece in pieces if any(piece[1:])]
        return [(*piece, whole if piece is told[-1] else None) for piece in told]

    def ended(self, request: Request) -> list[Request]:
        self._by_request[id(request)].finish()
        self._num_open -= 1
        if self._num_open == 0:
            self._conclude()
        return []

    def _conclude(self) -> None:
        self.output.num_cached_tokens = max(self.requests[0].num_cached_tokens, 0)
        completions = [sample.completion for sample in self._samples]
        if self._ranked:
            for completion in completions:
                completion.score = sum(_logprobs_of(completion))
            completions.sort(key=lambda each: -mean_logprob(_logprobs_of(each)))
            del completions[self._sampling.n :]
        for index, completion in enumerate(completions):
            completion.index = index
            if self._sampling.logprobs is None:
                completion.logprobs = None
        self.output.outputs = completions


def _logprobs_of(completion: CompletionOutput) -> list[float]:
    return [entry.logprob for entry in completion.logprobs or ()]


def _of_sample(sampling: SamplingParams, number: int) -> SamplingParams:
    """A prompt's completions have seeds of their own, and the first reads the prompt."""
    return replace(
        sampling,
        seed=None if sampling.seed is None else seed_of_completion(sampling.seed, number),
        max_tokens=1 if sampling.max_tokens == 0 else sampling.max_tokens,
        prompt_logprobs=sampling.prompt_logprobs if number == 0 else None,
    )


class _Sample:
    """One completion under way."""

    def __init__(
        self, request: Request, sampling: SamplingParams, text: OutputText, eos_token_ids: tuple[int, ...]
    ) -> None:
        self.request = request
        self.completion = CompletionOutput(logprobs=None if sampling.logprobs is None else [])
        self._sampling = sampling
        self._text = text
        self._eos_token_ids = () if sampling.ignore_eos else eos_token_ids
        self._told = (0, 0, False)

    def news(self) -> tuple[str, list[int], str | None]:
        """Text and ids since the last call, and, once, why it ended."""
        completion = self.completion
        if completion.finish_reason is None:
            self.catch_up()
        num_chars, num_ids, end_told = self._told
        self._told = (len(completion.text), len(completion.token_ids), completion.finish_reason is not None)
        reason = None if end_told else completion.finish_reason
        return completion.text[num_chars:], completion.token_ids[num_ids:], reason

    def catch_up(self) -> bool:
        """Takes the tokens generated since the last call; True if a stop string ended the output. Without
        stop strings to look for, one call at the end is enough.
        """
        completion, request = self.completion, self.request
        new = request.token_ids[request.num_prompt_tokens + len(completion.token_ids) :].tolist()
        completion.token_ids += new
        completion.text += self._text.push(new[:-1] if self._ends_silently else new)[0]
        return self._stopped_by_string()

    @property
    def _ends_silently(self) -> bool:
        """Whether the last token ended the output and is no part of its text."""
        return self.request.stop_token_id is not None and not self._sampling.include_stop_str_in_output

    def _stopped_by_string(self) -> bool:
        if self._text.stop_string is None or self.completion.finish_reason is not None:
            return False
        self.completion.finish_reason, self.completion.stop_reason = "stop", self._text.stop_string
        return True

    def finish(self) -> None:
        """The scheduler ended it.

        Raises:
            PagewireError: because it failed.
        """
        completion, request = self.completion, self.request
        _check_end(request)
        if self._sampling.max_tokens == 0:  # the token was sampled only because the prompt was to be read
            completion.finish_reason, completion.logprobs = "length", completion.logprobs and []
            return
        if completion.finish_reason is not None:
            return
        self.catch_up()
        completion.text += self._text.finish()
        if self._stopped_by_string():
            return
        completion.finish_reason = "stop" if request.end_reason is EndReason.STOP else "length"
        if request.stop_token_id is not None and request.stop_token_id not in self._eos_token_ids:
            completion.stop_reason = request.stop_token_id


class SearchJob(Job):
    """Beam search: a request of one token for each beam and step."""

    def __init__(
        self,
        output: RequestOutput,
        sampling: SamplingParams,
        tokenizer: TextTokenizer,
        facts: WorkerFacts,
        cache_salt: str,
        adapter_id: int,
    ) -> None:
        super().__init__(output, sampling, tokenizer, facts, cache_salt, adapter_id)
        room = max(facts.limits.max_model_len - len(output.prompt_token_ids), 1)
        max_tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        eos = frozenset(facts.eos_token_ids)
        self._eos_token_ids = frozenset() if sampling.ignore_eos else eos
        self._searcher = BeamSearcher(sampling, eos_token_ids=eos, max_tokens=max_tokens)
        self._found: dict[int, Candidates] = {}
        self._num_open = 1
        self._step = [self._request((), prompt_logprobs=sampling.prompt_logprobs)]
        self.requests = self._step

    def _request(self, token_ids: Sequence[int], *, prompt_logprobs: int | None = None) -> Request:
        sampling = SamplingParams(
            temperature=0,
            max_tokens=1,
            ignore_eos=True,
            logprobs=max(self._searcher.num_candidates, self._sampling.logprobs or 0),
            prompt_logprobs=prompt_logprobs,
        )
        ids = [*self.output.prompt_token_ids, *token_ids]
        return make_request(
            self.output.request_id,
            ids,
            sampling,
            self._facts,
            owner=self,
            cache_salt=self._cache_salt,
            group=self.output.request_id,
            part=int(bool(token_ids)),
            adapter_id=self._adapter_id,
        )

    def add_logprobs(self, request: Request, entry: records.TokenLogprobs) -> None:
        pairs = zip(map(int, entry.top_ids), map(float, entry.top_logprobs), strict=True)
        self._found[id(request)] = list(pairs)

    def ended(self, request: Request) -> list[Request]:
        _check_end(request)
        if request is self.requests[0]:
            self.output.num_cached_tokens = max(request.num_cached_tokens, 0)
        self._num_open -= 1
        if self._num_open:
            return []
        self._searcher.advance([self._found.pop(id(each)) for each in self._step])
        if self._searcher.is_over:
            best = self._searcher.best[: self._sampling.n]
            self.output.outputs = [self._output(index, found) for index, found in enumerate(best)]
            return []
        self._step = [self._request(beam.token_ids) for beam in self._searcher.beams]
        self._num_open = len(self._step)
        return self._step

    def _output(self, index: int, found: Hypothesis) -> CompletionOutput:
        sampling, ids = self._sampling, list(found.beam.token_ids)
        logprobs = None
        if sampling.logprobs is not None:
            logprobs = [
                TokenLogprobs(logprob, dict(candidates[: sampling.logprobs]))
                for logprob, candidates in found.beam.steps
            ]
        by_stop_token = found.stopped and ids[-1] not in self._eos_token_ids
        return CompletionOutput(
            whole_text(self._tokenizer, sampling, ids, stopped=found.stopped),
            ids,
            "stop" if found.stopped else "length",
            ids[-1] if by_stop_token else None,
            logprobs,
            index,
            found.score,
        )


def _check_end(request: Request) -> None:
    if request.end_reason is EndReason.ERROR:
        raise PagewireError(f"{request.request_id} failed: {request.error}")
