"""One answer: read from the server's stream, shown while it comes."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from pagewire.cli.talk.display import Display
from pagewire.cli.talk.stats import AnswerStats
from pagewire.inference.v1 import inference_pb2 as pb


@dataclass(slots=True)
class Answer:
    """What came.

    Attributes:
        text: the answer.
        reasoning: what the model thought before it.
        tool_calls: calls of tools, as OpenAI's API writes them.
        stopped: whether the reader stopped it.
        finish_reason: why it ended, where it did so by itself.
        stats: its counts and times.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False
    finish_reason: int = pb.FINISH_REASON_UNSPECIFIED
    stats: AnswerStats = field(default_factory=AnswerStats)

    @property
    def is_empty(self) -> bool:
        """Whether nothing came."""
        return not (self.text or self.reasoning or self.tool_calls)

    def message(self) -> dict[str, Any]:
        """The assistant's turn, as OpenAI's API writes it."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return message


def read_answer(events: Iterator[pb.GenerateResponse], display: Display) -> Answer:
    """Shows the answer as it comes and returns it. Ctrl-C stops it; what came so far stays.

    Raises:
        PagewireError: what the server answered.
    """
    answer = Answer()
    clock = _Clock()
    try:
        for event in events:
            if event.HasField("delta"):
                clock.tick(len(event.delta.token_ids))
                _add(answer, event.delta, display)
            elif event.HasField("finished"):
                answer.finish_reason = event.finished.finish_reason
                _count(answer.stats, event.finished.usage)
    except KeyboardInterrupt:
        answer.stopped = True
    finally:
        if isinstance(events, Generator):
            events.close()  # aborts the request, if it has not ended
    for call in answer.tool_calls:
        display.call(call["function"]["name"], call["function"]["arguments"])
    if answer.stopped:
        display.note("[stopped]")
    elif answer.finish_reason == pb.FINISH_REASON_LENGTH:
        display.note("[cut off: no more tokens are allowed; see /set max_tokens]")
    elif answer.finish_reason == pb.FINISH_REASON_ABORT:
        display.note("[cut off: the server ended it]")
    display.end()
    clock.write(answer.stats)
    return answer


def _add(answer: Answer, delta: pb.Delta, display: Display) -> None:
    answer.reasoning += delta.reasoning
    answer.text += delta.text
    display.thought(delta.reasoning)
    display.text(delta.text)
    for news in delta.tool_calls:
        while len(answer.tool_calls) <= news.index:
            answer.tool_calls.append(
                {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
            )
        call = answer.tool_calls[news.index]
        call["id"] += news.id
        call["function"]["name"] += news.name
        call["function"]["arguments"] += news.arguments_json
    _count(answer.stats, delta.usage)


def _count(stats: AnswerStats, usage: pb.Usage) -> None:
    if usage.ByteSize():  # some events have none
        stats.prompt_tokens = usage.prompt_tokens
        stats.cached_tokens = usage.cached_tokens
        stats.completion_tokens = usage.completion_tokens


class _Clock:
    """Notes when tokens come."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._first = self._last = 0.0
        self._tokens_after_first = 0

    def tick(self, num_tokens: int) -> None:
        """Some tokens came."""
        if num_tokens:
            self._last = time.perf_counter()
            if self._first:
                self._tokens_after_first += num_tokens
            else:
                self._first = self._last

    def write(self, stats: AnswerStats) -> None:
        """Writes the times of one answer."""
        stats.answers = 1
        if self._first:
            stats.first_token_seconds = self._first - self._began
            stats.decode_seconds = self._last - self._first
            stats.decode_tokens = self._tokens_after_first
