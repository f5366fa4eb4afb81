"""A completion under way: the events that a client sees, made from the tokens that the scheduler sends."""

from __future__ import annotations

import time
from collections.abc import Callable

from frontend.generation.events import Delta, Finished, FinishReason, PositionLogprobs, Usage
from frontend.generation.message_parser import MessageParser, MessagePart
from frontend.generation.open_request import OpenRequest
from frontend.generation.output_text import OutputText
from pagewire.base.errors import PagewireError
from pagewire.scheduler.v1 import scheduler_pb2
from pagewire.wire.ended_messages import error_in
from pagewire.wire.sampling_params import SamplingParams

_REASONS = {
    scheduler_pb2.END_REASON_STOP: FinishReason.STOP,
    scheduler_pb2.END_REASON_LENGTH: FinishReason.LENGTH,
    scheduler_pb2.END_REASON_ABORT: FinishReason.ABORT,
}


class Completion:
    """Reads one open request and says what it means.

    Attributes:
        index: its place among its answer's completions.
        is_over: whether there is nothing more to read.
        failure: why it failed, once it has.
        first_token_at: `time.perf_counter` when the first token was read, once it was.
    """

    def __init__(
        self,
        request: OpenRequest,
        *,
        index: int,
        sampling: SamplingParams,
        text: OutputText,
        eos_token_ids: frozenset[int],
        close: Callable[[OpenRequest], None],
        parser: MessageParser | None = None,
    ) -> None:
        self.request = request
        self.index = index
        self._sampling = sampling
        self._text = text
        self._eos_token_ids = frozenset() if sampling.ignore_eos else eos_token_ids
        self._close = close
        self._parser = parser
        self._made_calls = False
        self._wants_nothing = sampling.max_tokens == 0
        self._num_prompt_tokens = len(request.prompt_ids)
        self.num_output_tokens = 0
        self.is_over = False
        self.failure: PagewireError | None = None
        self.first_token_at: float | None = None

    def read(self) -> list[Delta | Finished]:
        """What there is to say since the last call: a delta, the end, both or neither. After a failure, what
        was generated until then."""
        if self.is_over:
            return []
        if self._wants_nothing:
            return [self._finish(FinishReason.LENGTH)]  # only the prompt was wanted
        request = self.request
        ended = request.ended
        token_ids, logprobs = request.take()
        if not token_ids and ended is None:
            return []
        text = self._read(token_ids, ended)
        stop_string = self._text.stop_string
        if stop_string is not None:
            # Before the client gets to read the rest: the scheduler must not generate for nothing.
            request.is_complete = True
            self._close(request)
            del logprobs[len(token_ids) :]
        self.num_output_tokens += len(token_ids)
        if self.first_token_at is None and token_ids:
            self.first_token_at = time.perf_counter()
        self.is_over = stop_string is not None or ended is not None
        events: list[Delta | Finished] = []
        if self._parser is not None:
            events += self._parsed(token_ids, self._parser.push(text, last=self.is_over), logprobs)
        elif token_ids or text:
            positions = _positions(token_ids, logprobs)
            events.append(Delta(token_ids, text, positions, self.usage(), self.index))
        if stop_string is not None:
            events.append(self._finish(FinishReason.STOP, stop_string=stop_string))
        elif ended is not None:
            events += self._ended(ended)
        return events

    def usage(self) -> Usage:
        """This completion's counts so far."""
        return Usage(self._num_prompt_tokens, self.request.num_cached_tokens or 0, self.num_output_tokens)

    def _parsed(
        self, token_ids: list[int], part: MessagePart, logprobs: list[scheduler_pb2.TokenLogprobs]
    ) -> list[Delta]:
        self._made_calls |= bool(part.tool_calls)
        if not (token_ids or part.content or part.reasoning or part.tool_calls):
            return []
        return [
            Delta(
                token_ids,
                part.content,
                _positions(token_ids, logprobs),
                self.usage(),
                index=self.index,
                reasoning=part.reasoning,
                tool_calls=part.tool_calls,
            )
        ]

    def _read(self, token_ids: list[int], ended: scheduler_pb2.Ended | None) -> str:
        """The text that new ids complete. Ids after a stop string are removed: they are not output."""
        if ended is None:
            text, num_used = self._text.push(token_ids)
            if num_used < len(token_ids):
                del token_ids[num_used:]
            return text
        ended_by_token = (
            ended.reason == scheduler_pb2.END_REASON_STOP
            and token_ids
            and token_ids[-1] == ended.stop_token_id
        )
        hidden = 1 if ended_by_token and not self._sampling.include_stop_str_in_output else 0
        text, num_used = self._text.push(token_ids[: len(token_ids) - hidden])
        if self._text.stop_string is not None:
            del token_ids[num_used:]
        else:
            text += self._text.finish()
        return text

    def _ended(self, ended: scheduler_pb2.Ended) -> list[Finished]:
        reason = _REASONS.get(ended.reason)
        if reason is None:
            self.failure = error_in(ended)
            return []
        stop_token_id = ended.stop_token_id if reason is FinishReason.STOP else None
        if stop_token_id in self._eos_token_ids:
            stop_token_id = None
        return [self._finish(reason, stop_token_id=stop_token_id)]

    def _finish(
        self, reason: FinishReason, *, stop_string: str | None = None, stop_token_id: int | None = None
    ) -> Finished:
        self.is_over = True
        self._close(self.request)
        if self._made_calls and reason is FinishReason.STOP:
            reason = FinishReason.TOOL_CALLS
        return Finished(reason, self.usage(), stop_string, stop_token_id, index=self.index)


def _positions(token_ids: list[int], logprobs: list[scheduler_pb2.TokenLogprobs]) -> list[PositionLogprobs]:
    if not logprobs:
        return []
    return [position(*pair) for pair in zip(token_ids, logprobs, strict=True)]


def position(token_id: int, entry: scheduler_pb2.TokenLogprobs) -> PositionLogprobs:
    """A token's log probabilities as a client sees them."""
    return PositionLogprobs(
        token_id, entry.logprob, list(zip(entry.top_ids, entry.top_logprobs, strict=True))
    )
