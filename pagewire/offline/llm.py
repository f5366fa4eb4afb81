"""Generation without a server: `LLM` loads a model and completes prompts, as fast as a full batch allows."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast, overload

from engine.config import WorkerConfig
from frontend.chat.conversation import Conversation as Turns
from frontend.scoring.score import pair_up
from frontend.served_model import ServedModel
from frontend.text.template_renderer import RENDERER
from pagewire.base.errors import ConfigError, InvalidRequest, PagewireError
from pagewire.hub import DEFAULT_MODEL, resolve_checkpoint
from pagewire.hub.names.model_name import default_model_name
from pagewire.offline.engine import STEP_TIMEOUT, OfflineEngine
from pagewire.offline.jobs import Job, open_job
from pagewire.offline.outputs import ClassificationOutput as ClassificationOutput
from pagewire.offline.outputs import CompletionOutput as CompletionOutput
from pagewire.offline.outputs import RequestOutput as RequestOutput
from pagewire.offline.outputs import StreamOutput as StreamOutput
from pagewire.offline.outputs import TokenLogprobs as TokenLogprobs
from pagewire.offline.pooled import Prompts, Vectors, classify, embed, score
from pagewire.offline.prompts import Prompt, read_prompt
from pagewire.offline.streams import Follower, cumulative
from pagewire.structured.closing import with_closed_objects
from pagewire.wire.query_history import QueryRequest, QueryResponse, to_answer, to_messages
from pagewire.wire.sampling_params import SamplingParams
from scheduler.request import EndReason, Request
from scheduler.settings import INFLIGHT, CoreSettings
from scheduler.step import StepOutput

Conversation = Sequence[Mapping[str, Any]]
Loras = str | Sequence[str | None] | None
"""The name of an adapter, or one for each prompt; None is the model alone."""
_UNBOUNDED = 2**31
_open: set[int] = set()
"""Ids of the LLMs that are not closed, which share the process that renders chat templates."""


class LLM:
    """A model, loaded into an engine-worker of its own.

    Use it as a context manager, or `close()` it; it also closes when it is collected.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        enable_prefix_caching: bool = True,
        open_schemas: bool = False,
        batching_strategy: str = INFLIGHT,
        step_timeout: float = STEP_TIMEOUT,
        lora_modules: Mapping[str, str | Path] | None = None,
        **worker_options: Any,
    ) -> None:
        """Args:
        model: a directory in Hugging Face layout, a .gguf file, a model on a hub or an alias.
        enable_prefix_caching: whether prompts share the KV of their common beginnings.
        open_schemas: whether objects may have properties that their JSON Schema does not name, as its letter
            says; otherwise only where the schema says so itself.
        batching_strategy: "inflight", or to compare with it "none" (one prompt at a time), or "static" or
            "dynamic" (both in batches of `max_num_seqs`, each of which begins when the one before is over).
        step_timeout: seconds after which a worker that has not finished a step counts as hung and is killed;
            five times as many for its first steps.
        lora_modules: LoRA adapters to load at once, name -> directory or repository on a hub; it takes
            `enable_lora=True`.
        worker_options: fields of `engine.config.WorkerConfig`, such as `dtype`, `device`, `max_model_len`,
            `max_num_seqs`, `max_num_batched_tokens`, `gpu_memory_utilization`, `load_format`,
            `enable_lora`.

        Raises:
            ConfigError: an option, the model or an adapter is wrong.
        """
        self._engine: OfflineEngine | None = None
        if lora_modules and not worker_options.get("enable_lora"):
            raise ConfigError("lora_modules takes enable_lora=True", param="enable_lora")
        settings = CoreSettings(
            max_num_waiting=_UNBOUNDED,
            enable_prefix_caching=enable_prefix_caching,
            batching_strategy=batching_strategy,
        )
        wanted = WorkerConfig(**worker_options, model=model, socket=Path())
        directory, load_format = resolve_checkpoint(model, wanted.load_format, progress=True)
        config = replace(wanted, model=str(directory), load_format=load_format)
        _open.add(id(self))
        self._text = ServedModel.load(directory, (default_model_name(model),), None)
        self._engine = OfflineEngine(config, settings=settings, step_timeout=step_timeout)
        self._ids = count()
        self._open_schemas = open_schemas
        self._is_generating = False
        try:
            for name, path in (lora_modules or {}).items():
                self.load_lora(name, path)
        except PagewireError as error:
            self.close()
            raise ConfigError(f"lora_modules: {error.message}", param="lora_modules") from error

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Stops the worker, and what else was started for this LLM. Closing twice is fine."""
        engine, self._engine = getattr(self, "_engine", None), None
        if engine is not None:
            engine.close()
        _open.discard(id(self))
        if not _open:
            RENDERER.close()

    @property
    def default_sampling_params(self) -> SamplingParams:
        """What the model's authors recommend (generation_config.json)."""
        return SamplingParams(**self._text.defaults)

    @property
    def loras(self) -> tuple[str, ...]:
        """The names of the adapters that prompts may be computed with."""
        return self._running().adapters.names

    def load_lora(self, name: str, path: str | Path) -> None:
        """Loads a LoRA adapter beside the model.

        Args:
            name: what `generate`, `stream` and `chat` call it.
            path: a directory as PEFT or ms-swift writes it, or a repository on a hub.

        Raises:
            ConfigError: there is no adapter.
            InvalidRequest: it is damaged or does not fit the model, or the name is taken.
            Unsupported: the LLM was not opened with `enable_lora=True`.
            Unavailable: the worker died.
        """
        self._idle().load_adapter(name, path)

    def unload_lora(self, name: str) -> None:
        """Forgets an adapter.

        Raises:
            NotFound: there is none of this name.
            Unsupported: the LLM was not opened with `enable_lora=True`.
            Unavailable: the worker died.
        """
        self._idle().unload_adapter(name)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        truncate_prompt_tokens: int | None = None,
        lora: Loras = None,
    ) -> list[RequestOutput]:
        """Completes prompts, all in one batch as far as memory allows, and returns them in their order.

        Args:
            prompts: a text, a list of token ids, or a list of either. Instead of a text also
                {"prompt": text}, instead of ids {"prompt_token_ids": ids}, either with a "cache_salt": cached
                prefixes are shared only between prompts of the same one.
            sampling_params: for all prompts, or one for each; default the model's recommendation.
            truncate_prompt_tokens: keeps this many tokens at each prompt's end; -1 keeps what the model's
                context has room for beside max_tokens.
            lora: the name of the adapter to compute all prompts with, or one for each; None is the model
                alone.

        Raises:
            InvalidRequest: a prompt or parameter is wrong; nothing is generated then.
            NotFound, Unsupported: there is no such adapter, or there are none at all.
            Unavailable: the worker died.
        """
        jobs = self._jobs(_as_batch(prompts), sampling_params, truncate_prompt_tokens, lora)
        for _ in self._steps(jobs):
            pass
        return [job.output for job in jobs]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        messages: Conversation | Sequence[Conversation] | None = None,
        truncate_prompt_tokens: int | None = None,
        lora: Loras = None,
    ) -> Generator[StreamOutput, None, None]:
        """Completes prompts as `generate` does, or answers conversations as `chat` does, and yields pieces as
        soon as they have been generated. Pieces of all prompts come mixed: `StreamOutput.prompt_index` says
        to which each belongs.

        The engine works while the pieces are read. Closing the generator, or leaving it, ends the requests.
        Until then nothing else can be asked of this LLM.

        Args:
            prompts, sampling_params, truncate_prompt_tokens, lora: see `generate`.
            messages: one conversation or several, instead of prompts.

        Raises:
            InvalidRequest: a prompt or parameter is wrong; nothing is generated then.
            Unavailable: the worker died (on iteration).
        """
        if (prompts is None) == (messages is None):
            raise InvalidRequest("give either prompts or messages", param="prompts")
        batch = self._rendered(messages or ()) if prompts is None else _as_batch(prompts)
        jobs = self._jobs(batch, sampling_params, truncate_prompt_tokens, lora)
        return self._pieces(jobs)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: Loras = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, rendered by the model's chat template. See `generate`.

        Raises:
            InvalidRequest: the model has no template, or the template refuses a conversation.
        """
        return self.generate(self._rendered(messages), sampling_params, lora=lora)

    @overload
    def infer(
        self,
        request_list: Sequence[QueryRequest],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: Literal[False] = False,
    ) -> list[QueryResponse]: ...

    @overload
    def infer(
        self,
        request_list: Sequence[QueryRequest],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: Literal[True],
    ) -> Generator[list[QueryResponse], None, None]: ...

    def infer(
        self,
        request_list: Sequence[QueryRequest],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: bool = False,
    ) -> list[QueryResponse] | Generator[list[QueryResponse], None, None]:
        """Answers queries that bring their history, in the form of ms-swift.

        Args:
            request_list: each {"query": text, "history": [[query, response], ...], "system": text}; the last
                two may be left out.
            sampling_params: for all requests, or one for each; default the model's recommendation.
            stream: whether to return an iterator of all answers as far as they have come, list after list.

        Returns:
            For each request {"response": text, "history": ...}, whose history is the request's with this turn
            added: what the next request sends.

        Raises:
            InvalidRequest: a request is wrong, or the model has no chat template; nothing is generated then.
        """
        turns = [to_messages(each, f"request_list[{place}]") for place, each in enumerate(request_list)]
        if stream:
            jobs = self._jobs(self._rendered(turns), sampling_params, None)
            return cumulative(request_list, self._followed(jobs))
        outputs = self.chat(turns, sampling_params)
        return [
            to_answer(request, output.outputs[0].text)
            for request, output in zip(request_list, outputs, strict=True)
        ]

    def _rendered(self, messages: Conversation | Sequence[Conversation]) -> list[Prompt]:
        """The prompts of one conversation or several."""
        if self._text.template is None:
            raise InvalidRequest(
                "the model has no chat template; use generate() with a text", param="messages"
            )
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Conversation], [messages] if one else messages)
        prompts: list[Prompt] = []
        for conversation in conversations:
            turns = [dict(message) for message in conversation]
            rendered = self._text.template.render_prompt(Turns(messages=turns))
            prompts.append(self._text.encode_prompt(rendered))
        return prompts

    def embed(
        self,
        prompts: Prompts,
        *,
        pooling: Literal["last", "mean", "cls"] | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
    ) -> Vectors:
        """Turns texts or lists of token ids into vectors, from the model's hidden states.

        Args:
            pooling: how a vector is made of the tokens' states: the last one's, their mean or the first one's
                ("cls"); None for the model's own way.
            normalize: whether vectors are scaled to length 1; None for the model's own way.
            dimensions: keeps this many numbers of each vector, from its beginning.

        Returns:
            [prompts, numbers of a vector], float32.

        Raises:
            Unsupported: the model classifies.
            InvalidRequest: a prompt or option is wrong, or the model has no way of its own and none was asked
                for; nothing is computed then.
            Unavailable: the worker died.
        """
        return embed(
            self._idle(), self._text, prompts, pooling=pooling, normalize=normalize, dimensions=dimensions
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes that the model tells apart; none of a model that generates."""
        return self._running().facts.labels

    def classify(self, prompts: Prompts, *, use_activation: bool = True) -> list[ClassificationOutput]:
        """Classifies texts or lists of token ids by the model's classification head.

        Args:
            use_activation: whether probabilities are wanted; otherwise the logits.

        Raises:
            Unsupported: the model has no classification head.
            InvalidRequest: a prompt is wrong; nothing is computed then.
            Unavailable: the worker died.
        """
        return classify(self._idle(), self._text, prompts, use_activation=use_activation)

    def score(
        self, first: str | Sequence[str], second: str | Sequence[str], *, use_activation: bool = True
    ) -> list[float]:
        """Scores how well pairs of texts go together, by a cross-encoder: a classifier with one class.

        Args:
            first: one text for all of the second ones, or one for each, such as queries.
            second: such as documents.
            use_activation: whether scores between 0 and 1 are wanted; otherwise the logits.

        Raises:
            Unsupported: the model is no cross-encoder.
            InvalidRequest: the numbers of texts do not fit, or one is too long.
            Unavailable: the worker died.
        """
        sides = [[each] if isinstance(each, str) else each for each in (first, second)]
        pairs = pair_up(sides[0], sides[1], ("first", "second"))
        return score(self._idle(), self._text, pairs, use_activation=use_activation)

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

    def _jobs(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        truncate_prompt_tokens: int | None,
        lora: Loras = None,
    ) -> list[Job]:
        params = self._as_params(sampling_params, len(prompts))
        names = [lora] * len(prompts) if lora is None or isinstance(lora, str) else lora
        if len(names) != len(prompts):
            raise InvalidRequest(
                f"{len(names)} adapters for {len(prompts)} prompts; name one for each", param="lora"
            )
        ids = [self._idle().adapters.id_of(name) for name in names]
        return [
            self._job(prompt, each, truncate_prompt_tokens, adapter_id)
            for prompt, each, adapter_id in zip(prompts, params, ids, strict=True)
        ]

    def _job(
        self, prompt: Prompt, sampling: SamplingParams, truncate_prompt_tokens: int | None, adapter_id: int
    ) -> Job:
        engine, tokenizer = self._idle(), self._text.tokenizer
        if sampling.structured_output is not None and not self._open_schemas:
            sampling = replace(sampling, structured_output=with_closed_objects(sampling.structured_output))
        read = read_prompt(
            prompt, tokenizer, sampling, engine.facts.limits.max_model_len, truncate_prompt_tokens
        )
        job = open_job(f"offline-{next(self._ids)}", read, sampling, tokenizer, engine.facts, adapter_id)
        for request in job.requests:
            engine.check(request)
        return job

    def _pieces(self, jobs: Sequence[Job]) -> Generator[StreamOutput, None, None]:
        with closing(self._followed(jobs)) as steps:
            for news in steps:
                yield from news

    def _followed(self, jobs: Sequence[Job]) -> Generator[list[StreamOutput], None, None]:
        """Runs jobs, and yields what each step adds to them."""
        follower = Follower(jobs)
        with closing(self._steps(jobs)) as steps:
            for step in steps:
                yield follower.news(step)
                self._running()  # the reader may have closed it

    def _steps(self, jobs: Sequence[Job]) -> Generator[StepOutput, None, None]:
        """Runs jobs, and yields each step after they have taken it."""
        engine = self._idle()
        self._is_generating = True
        running = {id(request): request for job in jobs for request in job.requests}
        watching = any(job.watches for job in jobs)
        try:
            for request in running.values():
                engine.add(request)
            for step in engine.steps():
                for request, told in step.prompt_logprobs:
                    _job_of(request).add_prompt_logprobs(told)
                for index, entry in step.logprobs.items():
                    request = step.requests[index]
                    _job_of(request).add_logprobs(request, entry)
                for request in step.requests if watching else ():
                    if _job_of(request).catch_up(request) and engine.core.abort(request, EndReason.STOP):
                        _job_of(request).ended(request)
                for request in step.ended:
                    running.pop(id(request))
                    for further in _job_of(request).ended(request):
                        running[id(further)] = further
                        engine.add(further)
                yield step
        finally:
            self._is_generating = False
            engine.abort(list(running.values()))

    def _idle(self) -> OfflineEngine:
        """The engine, to ask something new of it."""
        engine = self._running()
        if self._is_generating:
            raise InvalidRequest(
                "this LLM has a stream open; read it to its end, or close() it, before asking something else"
            )
        return engine

    def _running(self) -> OfflineEngine:
        if self._engine is None:
            raise InvalidRequest("this LLM is closed")
        return self._engine


def _job_of(request: Request) -> Job:
    assert isinstance(request.owner, Job)
    return request.owner


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [cast(Prompt, prompts)]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]
