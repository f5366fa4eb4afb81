"""Generation without a server: `LLM` loads a model and completes prompts, as fast as a full batch allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from engine.config import WorkerConfig
from engine.dispatch import records
from frontend.chat.conversation import Conversation as Turns
from frontend.output_text import OutputText
from frontend.served_model import ServedModel
from pagewire.errors import InvalidRequest, PagewireError
from pagewire.hub import DEFAULT_MODEL, resolve_checkpoint
from pagewire.model_name import default_model_name
from pagewire.offline_engine import OfflineEngine
from pagewire.sampling_params import SamplingParams
from scheduler.intake import make_request
from scheduler.request import EndReason, Request

Prompt = str | Sequence[int]
Conversation = Sequence[Mapping[str, Any]]


@dataclass(slots=True)
class TokenLogprobs:
    """Log probabilities at one generated position.

    Attributes:
        logprob: of the generated token.
        top: token id -> log probability of the likeliest tokens, likeliest first.
    """

    logprob: float
    top: dict[int, float]


@dataclass(slots=True)
class CompletionOutput:
    """One completion.

    Attributes:
        text: the generated text.
        token_ids: the generated ids.
        finish_reason: "stop" or "length"; None while it is generated.
        stop_reason: the stop string or stop token id that ended it, unless it was the model's own end.
        logprobs: one entry for each id, if asked for.
        index: its place among the completions of the prompt.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None
    index: int = 0


@dataclass(slots=True)
class RequestOutput:
    """What came of one prompt.

    Attributes:
        request_id: its name in logs.
        prompt: as text; None if it was given as ids.
        prompt_token_ids: as ids.
        outputs: its completions.
        num_cached_tokens: prompt tokens found in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0


class LLM:
    """A model, loaded into an engine-worker of its own.

    Use it as a context manager, or `close()` it; it also closes when it is collected.
    """

    def __init__(
        self, model: str = DEFAULT_MODEL, *, enable_prefix_caching: bool = True, **worker_options: Any
    ) -> None:
        """Args:
        model: a directory in Hugging Face layout, a .gguf file, a Hugging Face id or an alias.
        enable_prefix_caching: whether prompts share the KV of their common beginnings.
        worker_options: fields of `engine.config.WorkerConfig`, such as `dtype`, `device`, `max_model_len`,
            `max_num_seqs`, `max_num_batched_tokens`, `gpu_memory_utilization`, `load_format`.

        Raises:
            ConfigError: an option or the model is wrong.
        """
        self._engine: OfflineEngine | None = None
        wanted = WorkerConfig(**worker_options, model=model, socket=Path())
        directory, load_format = resolve_checkpoint(model, wanted.load_format, progress=True)
        config = replace(wanted, model=str(directory), load_format=load_format)
        self._text = ServedModel.load(directory, (default_model_name(model),), None)
        self._engine = OfflineEngine(config, enable_prefix_caching=enable_prefix_caching)
        self._ids = count()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Stops the worker. Closing twice is fine."""
        engine, self._engine = getattr(self, "_engine", None), None
        if engine is not None:
            engine.close()

    @property
    def default_sampling_params(self) -> SamplingParams:
        """What the model's authors recommend (generation_config.json)."""
        return SamplingParams(**self._text.defaults)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts, all in one batch as far as memory allows, and returns them in their order.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            sampling_params: for all prompts, or one for each; default the model's recommendation.

        Raises:
            InvalidRequest: a prompt or parameter is wrong; nothing is generated then.
            Unavailable: the worker died.
        """
        batch = _as_batch(prompts)
        params = self._as_params(sampling_params, len(batch))
        jobs = [self._job(prompt, each) for prompt, each in zip(batch, params, strict=True)]
        self._run(jobs)
        return [job.output for job in jobs]

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, rendered by the model's chat template. See `generate`.

        Raises:
            InvalidRequest: the model has no template, or the template refuses a conversation.
        """
        if self._text.template is None:
            raise InvalidRequest(
                "the model has no chat template; use generate() with a text", param="messages"
            )
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Conversation], [messages] if one else messages)
        prompts = []
        for conversation in conversations:
            turns = [dict(message) for message in conversation]
            rendered = self._text.template.render(Turns(messages=turns))
            prompts.append(self._text.tokenizer.encode(rendered, add_special_tokens=False))
        return self.generate(prompts, sampling_params)

    def _as_params(
        self, sampling_params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> Sequence[SamplingParams]:
        if sampling_params is None:
            sampling_params = self.default_sampling_params
        if isinstance(sampling_params, SamplingParams):
            return [sampling_params] * count
        if len(sampling_params) != count:
            raise InvalidRequest(
                f"{len(sampling_params)} sampling_params for {count} prompts; give one for each"
            )
        return sampling_params

    def _job(self, prompt: Prompt, sampling: SamplingParams) -> _Job:
        engine = self._running()
        text = prompt if isinstance(prompt, str) else None
        ids = self._text.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        request = make_request(f"offline-{next(self._ids)}", ids, sampling, engine.facts)
        engine.check(request)
        completion = CompletionOutput(logprobs=None if sampling.logprobs is None else [])
        output = RequestOutput(request.request_id, text, ids, [completion])
        job = _Job(
            request, sampling, output, OutputText(self._text.tokenizer, sampling), engine.facts.eos_token_ids
        )
        request.owner = job
        return job

    def _run(self, jobs: list[_Job]) -> None:
        engine = self._running()
        requests = [job.request for job in jobs]
        watching = any(job.sampling.stop for job in jobs)
        try:
            for request in requests:
                engine.add(request)
            for step in engine.steps():
                for index, entry in step.logprobs.items():
                    _job_of(step.requests[index]).add_logprobs(entry)
                for job in map(_job_of, step.requests if watching else ()):
                    if job.sampling.stop and job.catch_up():
                        engine.core.abort(job.request, EndReason.STOP)
                for request in step.ended:
                    _job_of(request).finish()
        finally:
            engine.abort(requests)

    def _running(self) -> OfflineEngine:
        if self._engine is None:
            raise InvalidRequest("this LLM is closed")
        return self._engine


@dataclass(slots=True)
class _Job:
    """A prompt under way."""

    request: Request
    sampling: SamplingParams
    output: RequestOutput
    text: OutputText
    eos_token_ids: tuple[int, ...]

    @property
    def completion(self) -> CompletionOutput:
        return self.output.outputs[0]

    @property
    def is_over(self) -> bool:
        return self.completion.finish_reason is not None

    def add_logprobs(self, entry: records.TokenLogprobs) -> None:
        """Takes the log probabilities of the token just generated."""
        assert self.completion.logprobs is not None
        top = dict(zip(map(int, entry.top_ids), map(float, entry.top_logprobs), strict=True))
        self.completion.logprobs.append(TokenLogprobs(entry.logprob, top))

    def catch_up(self) -> bool:
        """Takes the tokens generated since the last call; True if a stop string ended the output. Without
        stop strings to look for, one call at the end is enough.
        """
        completion, request = self.completion, self.request
        new = request.token_ids[request.num_prompt_tokens + len(completion.token_ids) :].tolist()
        completion.token_ids += new
        self.output.num_cached_tokens = max(request.num_cached_tokens, 0)
        completion.text += self.text.push(new[:-1] if self._ends_silently else new)[0]
        return self._stopped_by_string()

    @property
    def _ends_silently(self) -> bool:
        """Whether the last token ended the output and is no part of its text."""
        return self.request.stop_token_id is not None and not self.sampling.include_stop_str_in_output

    def _stopped_by_string(self) -> bool:
        if self.text.stop_string is None or self.is_over:
            return False
        self.completion.finish_reason, self.completion.stop_reason = "stop", self.text.stop_string
        return True

    def finish(self) -> None:
        """The scheduler ended it."""
        if self.is_over:
            return
        request = self.request
        if request.end_reason is EndReason.ERROR:
            raise PagewireError(f"{request.request_id} failed: {request.error}")
        self.catch_up()
        self.completion.text += self.text.finish()
        if self._stopped_by_string():
            return
        self.completion.finish_reason = "stop" if request.end_reason is EndReason.STOP else "length"
        if request.stop_token_id is not None and request.stop_token_id not in self.eos_token_ids:
            self.completion.stop_reason = request.stop_token_id


def _job_of(request: Request) -> _Job:
    assert isinstance(request.owner, _Job)
    return request.owner


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]
