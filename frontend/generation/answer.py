"""What a client reads of one request: the events of all its completions, merged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from frontend.generation.completion import Completion, position
from frontend.generation.events import Delta, Event, Finished, PositionLogprobs, PromptRead, Usage
from frontend.generation.message_parser import ToolCallDelta
from frontend.generation.open_request import OpenRequest, Wakeup
from frontend.generation.prompts import PromptTokens
from pagewire.base.errors import Unavailable


@dataclass(slots=True)
class WholeChoice:
    """All events of a completion in one."""

    index: int
    finished: Finished
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    reasoning: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """Everything at once: the prompts, if they were wanted, the completions in order, and final counts."""

    prompts: list[PromptRead]
    choices: list[WholeChoice]
    usage: Usage


class Sink(Protocol):
    """Takes rounds of events where they arise, for as long as its client keeps up."""

    def ready(self) -> bool:
        """Whether it can take some now, without making anybody wait."""

    def take(self, events: Sequence[Event]) -> None:
        """Takes a round."""


class Answer(ABC):
    """One request's events, to be read once, by `rounds` or by `whole`.

    Attributes:
        request_id: the request's public id.
        relaxed: what was asked for and is not enforced; see `GenerationRequest`.
        finished: the first completion that ended, once one has.
        first_token_at: `time.perf_counter` when the first token was read, once one was.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.relaxed: Sequence[str] = ()
        self.finished: Finished | None = None

    @property
    @abstractmethod
    def first_token_at(self) -> float | None: ...

    @property
    @abstractmethod
    def usage(self) -> Usage:
        """Counts so far: every prompt once, and everything generated."""

    @abstractmethod
    def rounds(self, sink: Sink | None = None) -> AsyncGenerator[list[Event], None]:
        """Events, those together that came together: what goes into one write. A prompt comes before its
        completions, and every completion ends with one Finished.

        Args:
            sink: gets rounds in place of the caller while the caller waits for the next one, if it is ready.
                That spares most rounds the switch of tasks.

        Raises:
            PagewireError: the request failed, if only in one completion; what was generated until then has
                been yielded.
        """

    async def whole(self) -> WholeAnswer:
        """Everything at once.

        Raises:
            PagewireError: the request failed.
        """
        prompts: list[PromptRead] = []
        gathered: dict[int, _Gathered] = defaultdict(_Gathered)
        finished: dict[int, Finished] = {}
        async for events in self.rounds():
            for event in events:
                if isinstance(event, Delta):
                    gathered[event.index].add(event)
                elif isinstance(event, Finished):
                    finished[event.index] = event
                else:
                    prompts.append(event)
        choices = [gathered[index].whole(finished[index]) for index in sorted(finished)]
        return WholeAnswer(prompts, choices, self.usage)


@dataclass(slots=True)
class PromptProgress:
    """A prompt whose completions wait until it has been told of.

    Attributes:
        index: which of the request's prompts.
        prompt: its tokens.
        lead: the open request that reads it.
        wants_logprobs: whether its log probabilities are to be told.
        told: whether its event is out.
    """

    index: int
    prompt: PromptTokens
    lead: OpenRequest
    wants_logprobs: bool
    told: bool

    def read(self) -> list[PromptRead]:
        """Its event, once everything in it is known."""
        if self.told:
            return []
        entries: list[PositionLogprobs] = []
        token_ids = self.prompt.token_ids
        if self.wants_logprobs:
            if len(self.lead.prompt_logprobs) < len(token_ids) - 1:
                return []
            told = zip(token_ids[1:], self.lead.prompt_logprobs, strict=True)
            entries = [PositionLogprobs(token_ids[0], None, []), *(position(*pair) for pair in told)]
        self.told = True
        return [PromptRead(self.index, token_ids, self.prompt.text, self.prompt.offsets, entries)]


class SampledAnswer(Answer):
    """Completions that are read as they are generated."""

    def __init__(
        self,
        request_id: str,
        *,
        completions: Sequence[Completion],
        prompts: Sequence[PromptProgress],
        wakeup: Wakeup,
    ) -> None:
        """Args:
        completions: prompt by prompt, as many for each.
        prompts: one each.
        wakeup: tells of news of any completion.
        """
        super().__init__(request_id)
        self._completions = completions
        self._unread = list(completions)
        self._any_over = False
        self._per_prompt = len(completions) // len(prompts)
        self._prompts = prompts
        self._wakeup = wakeup

    @property
    def first_token_at(self) -> float | None:
        times = [each.first_token_at for each in self._completions if each.first_token_at is not None]
        return min(times, default=None)

    @property
    def usage(self) -> Usage:
        leads = [prompt.lead for prompt in self._prompts]
        return Usage(
            sum(len(lead.prompt_ids) for lead in leads),
            sum(lead.num_cached_tokens or 0 for lead in leads),
            sum(completion.num_output_tokens for completion in self._completions),
        )

    async def rounds(self, sink: Sink | None = None) -> AsyncGenerator[list[Event], None]:
        take = None if sink is None else partial(self._hand_over, sink)
        while self._unread:
            await self._wakeup.wait(take)
            events = self._read()
            if events:
                yield events
            if self._any_over:
                self._any_over = False
                self._check()
                self._unread = [completion for completion in self._unread if not completion.is_over]

    def _read(self) -> list[Event]:
        """What came since the last call."""
        events: list[Event] = []
        for completion in self._unread:
            prompt = self._prompts[completion.index // self._per_prompt]
            if not prompt.told:
                events += prompt.read()
            if prompt.told or prompt.lead.ended is not None:
                events += completion.read()
                self._any_over |= completion.is_over
        if events and self.finished is None and isinstance(events[-1], Finished):
            self.finished = events[-1]
        return events

    def _hand_over(self, sink: Sink) -> bool:
        """Gives the sink what came; whether `rounds` can go on waiting. Of an end `rounds` makes the best."""
        if not sink.ready():
            return False
        for completion in self._unread:
            if completion.request.ended is not None:
                return False
        events = self._read()
        if events:
            sink.take(events)
        return not self._any_over

    def _check(self) -> None:
        """Raises the failure of one of the completions."""
        for completion in self._unread:
            if completion.failure is not None:
                raise completion.failure
            if completion.is_over and not self._prompts[completion.index // self._per_prompt].told:
                raise Unavailable("the request was ended before its prompt was read; send it again")


class _Gathered:
    """What has come of one completion. Events are not kept: a thousand long answers would be a million
    objects, at which every full garbage collection looks."""

    __slots__ = ("_calls", "_logprobs", "_reasoning", "_texts", "_token_ids")

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[PositionLogprobs] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, ToolCallDelta] = {}

    def add(self, delta: Delta) -> None:
        self._token_ids += delta.token_ids
        self._texts.append(delta.text)
        self._logprobs += delta.logprobs
        if delta.reasoning:
            self._reasoning.append(delta.reasoning)
        for call in delta.tool_calls:
            known = self._calls.get(call.index)
            self._calls[call.index] = call if known is None else _longer(known, call)

    def whole(self, finished: Finished) -> WholeChoice:
        return WholeChoice(
            finished.index,
            finished,
            self._token_ids,
            "".join(self._texts),
            self._logprobs,
            "".join(self._reasoning),
            [self._calls[index] for index in sorted(self._calls)],
        )


def _longer(call: ToolCallDelta, more: ToolCallDelta) -> ToolCallDelta:
    return ToolCallDelta(
        call.index, call.id or more.id, call.name or more.name, call.arguments + more.arguments
    )
