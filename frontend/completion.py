"""A completion under way: the events that a client sees, made from the tokens that the scheduler sends."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from enum import Enum

from frontend.open_request import OpenRequest
from frontend.output_text import OutputText
from pagewire.errors import PagewireError, from_code
from pagewire.sampling_params import SamplingParams
from pagewire.scheduler.v1 import scheduler_pb2


class FinishReason(Enum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts so far; `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """Log probabilities at one generated position: of the token itself, and (id, log probability) of the
    likeliest ones, likeliest first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Delta:
    """What was generated since the delta before. `text` lags `token_ids` while a character or a possible
    stop string is incomplete. `logprobs` has one entry for each id if they were asked for, else none."""

    token_ids: list[int]
    text: str
    logprobs: list[PositionLogprobs]
    usage: Usage


@dataclass(frozen=True, slots=True)
class Finished:
    """The end. `stop_string` or `stop_token_id` is set if one of those, and not the model's own
    end-of-sequence token, was the reason."""

    reason: FinishReason
    usage: Usage
    stop_string: str | None = None
    stop_token_id: int | None = None


@dataclass(slots=True)
class WholeCompletion:
    """All deltas in one."""

    finished: Finished
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[PositionLogprobs] = field(default_factory=list)


_REASONS = {
    scheduler_pb2.END_REASON_STOP: FinishReason.STOP,
    scheduler_pb2.END_REASON_LENGTH: FinishReason.LENGTH,
    scheduler_pb2.END_REASON_ABORT: FinishReason.ABORT,
}


class Completion:
    """One request's events, to be read once, by `events` or by `whole`.

    Attributes:
        finish_reason: why it ended, once it has ended without an error.
        first_token_at: `time.perf_counter` when the first token was read, once it was.
    """

    def __init__(
        self,
        request: OpenRequest,
        *,
        sampling: SamplingParams,
        text: OutputText,
        eos_token_ids: frozenset[int],
        close: Callable[[OpenRequest], None],
    ) -> None:
        self._request = request
        self._sampling = sampling
        self._text = text
        self._eos_token_ids = frozenset() if sampling.ignore_eos else eos_token_ids
        self._close = close
        self._num_output_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.first_token_at: float | None = None

    @property
    def request_id(self) -> str:
        return self._request.request_id

    @property
    def prompt_ids(self) -> list[int]:
        return list(self._request.prompt_ids)

    async def events(self) -> AsyncGenerator[Delta | Finished, None]:
        """Deltas, as large as the reader is slow, then one Finished.

        Raises:
            PagewireError: the request failed; what was generated until then has been yielded.
        """
        request = self._request
        while True:
            await request.wait()
            token_ids, logprobs = request.take()
            ended = request.ended
            text = self._read(token_ids, ended)
            stop_string = self._text.stop_string
            if stop_string is not None:
                # Before the client gets to read the rest: the scheduler must not generate for nothing.
                self._close(request)
                del logprobs[len(token_ids) :]
            self._num_output_tokens += len(token_ids)
            if self.first_token_at is None and token_ids:
                self.first_token_at = time.perf_counter()
            if token_ids or text:
                yield Delta(token_ids, text, _positions(token_ids, logprobs), self._usage())
            if stop_string is not None:
                self.finish_reason = FinishReason.STOP
                yield Finished(FinishReason.STOP, self._usage(), stop_string=stop_string)
                return
            if ended is not None:
                yield self._finished(ended)
                return

    async def whole(self) -> WholeCompletion:
        """Everything at once.

        Raises:
            PagewireError: the request failed.
        """
        token_ids: list[int] = []
        texts: list[str] = []
        logprobs: list[PositionLogprobs] = []
        async for event in self.events():
            if isinstance(event, Finished):
                return WholeCompletion(event, token_ids, "".join(texts), logprobs)
            token_ids += event.token_ids
            texts.append(event.text)
            logprobs += event.logprobs
        raise PagewireError("the completion ended without a terminal event")

    def _read(self, token_ids: list[int], ended: scheduler_pb2.Ended | None) -> str:
        """The text that new ids complete. Ids after a stop string are removed: they are not output."""
        ended_by_token = (
            ended is not None
            and ended.reason == scheduler_pb2.END_REASON_STOP
            and token_ids
            and token_ids[-1] == ended.stop_token_id
        )
        hidden = 1 if ended_by_token and not self._sampling.include_stop_str_in_output else 0
        text, num_used = self._text.push(token_ids[: len(token_ids) - hidden])
        if self._text.stop_string is not None:
            del token_ids[num_used:]
        elif ended is not None:
            text += self._text.finish()
        return text

    def _finished(self, ended: scheduler_pb2.Ended) -> Finished:
        reason = _REASONS.get(ended.reason)
        if reason is None:
            raise from_code(ended.status, ended.error)
        self.finish_reason = reason
        stop_token_id = ended.stop_token_id if reason is FinishReason.STOP else None
        if stop_token_id in self._eos_token_ids:
            stop_token_id = None
        return Finished(reason, self._usage(), stop_token_id=stop_token_id)

    def _usage(self) -> Usage:
        request = self._request
        return Usage(len(request.prompt_ids), request.num_cached_tokens or 0, self._num_output_tokens)


def _positions(token_ids: list[int], logprobs: list[scheduler_pb2.TokenLogprobs]) -> list[PositionLogprobs]:
    if not logprobs:
        return []
    return [
        PositionLogprobs(token_id, entry.logprob, list(zip(entry.top_ids, entry.top_logprobs, strict=True)))
        for token_id, entry in zip(token_ids, logprobs, strict=True)
    ]
